"""The objectives of train_dpo.py over the pairs of a forest, or for kto over its answers: the loss
and what is logged, summed by the pairs' weights.

`config` is train_dpo.py's."""

import torch

from desc.encoding import Item
from desc.losses import dpo_loss, ipo_loss, kto_loss, simpo_loss
from desc.tree import send

# For kto, chosen means desirable answers, rejected the others, and accuracies the share of answers
# whose reward has the right sign.
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
METRICS += ("logps/chosen", "logps/rejected")


def weights_of(members: list[Item], device) -> torch.Tensor:
    """What these pairs count for: (B,)."""
    return send(torch.tensor([item.weight for item in members], dtype=torch.float32), device)


def preference_loss(
    config, policy: torch.Tensor, reference: torch.Tensor | None, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses, chosen rewards, rejected rewards) of pairs, (B,) each. policy and reference are
    log-probabilities, and `lengths` completion tokens, (B, 2) each.

    --sft-weight adds − log π(y_w|x) / |y_w| (Pang et al. 2024, Iterative Reasoning Preference
    Optimization)."""
    if config.objective == "dpo":
        logps = *policy.unbind(1), *reference.unbind(1)
        losses, chosen, rejected = dpo_loss(*logps, config.beta, config.label_smoothing)
    elif config.objective == "ipo":
        logps = *(policy / lengths).unbind(1), *(reference / lengths).unbind(1)
        losses, chosen, rejected = ipo_loss(*logps, config.beta)
    else:
        logps = (policy / lengths).unbind(1)
        losses, chosen, rejected = simpo_loss(*logps, config.beta, config.margin)
    if config.sft_weight:
        losses = losses - config.sft_weight * policy[:, 0] / lengths[:, 0]
    return losses, chosen, rejected


def shares_of_kinds(batch: list[Item], members: list[Item]) -> torch.Tensor:
    """By what to multiply kto's answers for means over the desirable ones of a batch, and over the
    others, if these are taken over the whole batch: (B, 2), of which one is 0."""
    total = sum(item.weight for item in batch)
    desirable = sum(item.weight for item in batch if item.desirable)
    others = sum(item.weight for item in batch if not item.desirable)
    rows = [(total / desirable, 0) if item.desirable else (0, total / others) for item in members]
    return torch.tensor(rows, dtype=torch.float32).view(-1, 2)


def sum_losses(
    config, batch: list[Item], members: list[Item], policy, reference, drift
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the loss, METRICS), both summed by their weights over some members of a batch: pairs, or for
    kto answers. policy and reference are (B, 2)."""
    device = policy.device
    if config.objective == "kto":
        shares, logps = send(shares_of_kinds(batch, members), device), policy[:, 0]
        desirable = shares[:, 0] > 0
        losses, rewards = kto_loss(logps, reference[:, 0], desirable, drift, config.beta)
        chosen, rejected = (shares * rewards[:, None]).unbind(1)
        policy = shares * logps[:, None]
    else:
        lengths = [[len(sequence.completion) for sequence in item.sequences] for item in members]
        lengths = send(torch.tensor(lengths).view(-1, 2), device)
        losses, chosen, rejected = preference_loss(config, policy, reference, lengths)
    weights = weights_of(members, device)
    return (weights * losses).sum(), sum_metrics(losses, chosen, rejected, policy, weights)


def sum_metrics(losses, chosen, rejected, policy, weights) -> torch.Tensor:
    """METRICS summed over a forest's pairs, by their weights: (7,). policy is (B, 2), all others
    are (B,)."""
    values = losses.detach(), chosen, rejected, chosen - rejected, (chosen > rejected).float()
    weighted = [weights * value for value in values]
    weighted += (weights[:, None] * policy.detach()).unbind(1)
    return torch.stack([value.sum() for value in weighted])
