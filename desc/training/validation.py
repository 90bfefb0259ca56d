"""What a planner plans for validation dialogues, exactly, and its scores."""

from collections import Counter
from dataclasses import dataclass

import torch

from desc.domain import Domain, Strategies
from desc.encoding import Item
from desc.esconv import Dialogue, first, gold_strategies
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
    counts: list[int]  # how often people use each strategy in the training dialogues

    def records(self, logps: torch.Tensor) -> list[dict]:
        """What desc.calibration.read_calibration reads, of log-probabilities (T, K): how often
        people use each strategy, and then each turn."""
        lines = [{"counts": dict(zip(self.strategies, self.counts))}]
        for item, gold, row in zip(self.items, self.gold, logps.tolist()):
            rounded = [round(value, 5) for value in row]
            lines.append({"turn": item.id, "gold": gold, "logps": rounded})
        return lines


def planned_turns(
    tokenizer, config: TrainConfig, splits: dict[str, list[Dialogue]], domain: Domain
) -> PlannedTurns | None:
    """The supporter turns of the validation dialogues that --eval-dialogues says; None if the
    module of --task plans nothing.

    Raises DescError if a turn is too long."""
    if config.task not in ("sp", "vanilla"):
        return None
    dialogues = first(splits["valid"], config.eval_dialogues)
    items = strategy_items(tokenizer, config.task, dialogues, domain, config)
    counted = Counter(gold_strategies(splits["train"]))
    counts = [counted[name] for name in domain.strategies]
    return PlannedTurns(items, gold_strategies(dialogues), domain.strategies, counts)


@torch.no_grad()
def planner_logps(model, config: TrainConfig, turns: PlannedTurns) -> torch.Tensor:
    """log p(strategy | context) at every turn, on every rank: (T, K) fp32 on the CPU."""
    scored: dict[str, torch.Tensor] = {}
    for members, forest in my_micro_batches(
        turns.items, "dialogue", config.max_tokens, model.device
    ):
        scored |= branch_logps(model, members, forest)
    for part in gather_objects(scored):
        scored |= part
    return torch.stack([scored[item.id] for item in turns.items])


def score_planner(
    model, config: TrainConfig, turns: PlannedTurns | None
) -> tuple[dict[str, float], list[dict]]:
    """A planner's exact scores, and what it planned (PlannedTurns.records); both empty without
    `turns`.

    They are the negative log-likelihood of the human strategy at T = 1, and accuracy, Q and B of
    the confusion matrix that sampling at the paper's T 0.7, top_p 0.95 has on average."""
    if turns is None:
        return {}, []
    logps = planner_logps(model, config, turns)
    counts = expected_confusion(temper(logps, 0.7, 0.95).numpy(), turns.gold, turns.strategies)
    scores = scores_of_confusion(counts)
    scored = {
        "valid/nll": negative_log_likelihood(logps.numpy(), turns.gold, turns.strategies),
        "valid/accuracy": scores.accuracy,
        "valid/Q": scores.macro_f1,
        "valid/B": bias_of_confusion(counts).bias,
    }
    return scored, turns.records(logps)
