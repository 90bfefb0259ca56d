"""The losses: pure functions of log-probabilities."""

import torch
import torch.nn.functional as F


def sft_loss(logps: torch.Tensor, tokens: int) -> torch.Tensor:
    """Cross-entropy per completion token: − Σ_s log π(y_s | x_s) / tokens, scalar.

    logps (S,) are summed over each completion's tokens; `tokens` counts those of the whole global
    batch, so that micro-batches add up to the batch's mean instead of to a mean of means."""
    return -logps.sum() / tokens


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7): − log σ(r_w − r_l), r =
    beta (log π − log π_ref).

    All inputs and all three outputs (losses, chosen rewards, rejected rewards) are (B,);
    log-probabilities are sums over a completion's tokens, never means (trl#789). The rewards are
    detached. `label_smoothing` ε is the share of pairs taken to be the wrong way round: −(1−ε) log
    σ(r_w − r_l) − ε log σ(r_l − r_w) (Mitchell's note on conservative DPO)."""
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    margins = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(
        -margins
    )
    return losses, chosen_rewards.detach(), rejected_rewards.detach()
