"""The losses: pure functions of log-probabilities; and what DPO of self-mined pairs aims at."""

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


def self_mined_optimum(
    people: torch.Tensor,
    reference: torch.Tensor,
    beta: float,
    temperature: float = 1.0,
    miner: torch.Tensor | None = None,
) -> torch.Tensor:
    """What DPO aims at if chosen answers are people's, drawn from p, and rejected answers are the
    reference's own, drawn from q at `temperature` T. All (…, K), probabilities of K answers:

        π* ∝ q^(1 − 1/(βT)) · p^(1/β)

    If the rejected answers are another model's, the `miner`'s m, then π* ∝ q · (p / m^(1/T))^(1/β).

    Why: of answers a and b, p(a) q_T(b) is how often a is chosen over b, with q_T ∝ q^(1/T). The
    loss is least where σ(r(a) − r(b)) is a's share of p(a) q_T(b) + p(b) q_T(a), so r = log p −
    log q_T + constant. And r = β log(π/q). At T = 1 it is what Chen et al. 2024 (SPIN, section 5)
    find for the logistic loss, with λ for β.

    top_p must be 1. An answer that it cuts off is never rejected, so no finite reward suffices."""
    log_p, log_q = people.log(), reference.log()
    log_m = log_q if miner is None else miner.log()
    return (log_q + (log_p - log_m / temperature) / beta).softmax(-1)


def ipo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Identity preference optimisation (Azar et al. 2023, equation 17): (h − 1 / (2 beta))², h =
    log(π/π_ref)(y_w) − log(π/π_ref)(y_l), with beta for their τ.

    Shapes and rewards as in dpo_loss. Log-probabilities are means over a completion's tokens, as
    its authors ask (trl#1265), so that long answers are not drawn to the same h as short ones."""
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    losses = (chosen - rejected - 1 / (2 * beta)) ** 2
    return losses, beta * chosen.detach(), beta * rejected.detach()


def simpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    beta: float,
    margin: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Simple preference optimisation (Meng et al. 2024, equation 6): − log σ(r_w − r_l − margin),
    r = beta log π(y|x) / |y|. There is no reference.

    Shapes and rewards as in dpo_loss. Log-probabilities are means over a completion's tokens, and
    `margin` is their γ."""
    chosen_rewards, rejected_rewards = beta * policy_chosen_logps, beta * policy_rejected_logps
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards - margin)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def kto_loss(
    policy_logps: torch.Tensor,
    reference_logps: torch.Tensor,
    desirable: torch.Tensor,
    drift: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, equation 8), of answers that are
    desirable or not, without pairs: 1 − σ(r − z) or 1 − σ(z − r), r = beta log(π/π_ref), z = beta
    max(0, drift).

    Log-probabilities (B,) are sums, `desirable` (B,) is bool. `drift`, a scalar, estimates the
    KL divergence of the policy from its reference: the mean of log(π/π_ref) over answers to other
    prompts. It carries no gradient. Returns (losses (B,), detached rewards (B,)). Both kinds weigh
    the same (their λ is 1)."""
    rewards = beta * (policy_logps - reference_logps)
    above = rewards - beta * drift.detach().clamp(min=0)
    losses = 1 - torch.where(desirable, above, -above).sigmoid()
    return losses, rewards.detach()
