"""The exact scores of a planner on validation dialogues."""

from dataclasses import dataclass

import torch

from desc.domain import Domain, Strategies
from desc.encoding import Item
from desc.esconv import Dialogue
from desc.flags import TrainConfig
from desc.metrics import (
    bias_of_confusion,
    expected_confusion,
    negative_log_likelihood,
    scores_of_confusion,
)
from desc.sampling import branch_logps, strategy_items, temper
from desc.training.batches import my_micro_batches
from desc.training.ranks import gather_objects


@dataclass(frozen=True)
class PlannedTurns:
    """Validation turns on which a planner is scored."""

    items: list[Item]  # each turn with all K strategies
    gold: list[str]
    strategies: Strategies


def planned_turns(
    tokenizer, config: TrainConfig, dialogues: list[Dialogue], domain: Domain
) -> PlannedTurns | None:
    """The supporter turns of dialogues; None if the module of --task plans nothing.

    Raises DescError if a turn is too long."""
    if config.task not in ("sp", "vanilla"):
        return None
    items = strategy_items(tokenizer, config.task, dialogues, domain, config.max_length)
    gold = [turn.strategy for dialogue in dialogues for turn in dialogue.supporter_turns()]
    return PlannedTurns(items, gold, domain.strategies)


@torch.no_grad()
def planner_scores(model, config: TrainConfig, turns: PlannedTurns) -> dict[str, float]:
    """A planner's exact scores: the negative log-likelihood of the human strategy at T = 1, and
    accuracy, Q and B of the confusion matrix that sampling at the paper's T 0.7, top_p 0.95 has on
    average."""
    scored: dict[str, torch.Tensor] = {}
    for members, forest in my_micro_batches(
        turns.items, "dialogue", config.max_tokens, model.device
    ):
        scored |= branch_logps(model, members, forest)
    for part in gather_objects(scored):
        scored |= part
    logps = torch.stack([scored[item.id] for item in turns.items])  # (T, K)
    counts = expected_confusion(temper(logps, 0.7, 0.95).numpy(), turns.gold, turns.strategies)
    scores = scores_of_confusion(counts)
    return {
        "valid/nll": negative_log_likelihood(logps.numpy(), turns.gold, turns.strategies),
        "valid/accuracy": scores.accuracy,
        "valid/Q": scores.macro_f1,
        "valid/B": bias_of_confusion(counts).bias,
    }
