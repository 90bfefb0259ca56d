"""The exact scores of a planner on validation dialogues."""

import torch

from desc.esconv import Dialogue
from desc.flags import TrainConfig
from desc.metrics import (
    bias_of_confusion,
    expected_confusion,
    negative_log_likelihood,
    scores_of_confusion,
)
from desc.sampling import branch_logps, strategy_items, temper
from desc.strategies import Strategies
from desc.training.batches import my_micro_batches
from desc.training.ranks import gather_objects
from desc.training.sharding import is_sharded


@torch.no_grad()
def planner_scores(
    model, tokenizer, config: TrainConfig, dialogues: list[Dialogue], strategies: Strategies
) -> dict[str, float]:
    """A planner's exact scores on dialogues: the negative log-likelihood of the human strategy at
    T = 1, and accuracy, Q and B of the confusion matrix that sampling at the paper's T 0.7,
    top_p 0.95 has on average."""
    items = strategy_items(tokenizer, config.task, dialogues, strategies, config.max_length)
    scored: dict[str, torch.Tensor] = {}
    for members, forest in my_micro_batches(model, items, "dialogue", config.max_tokens):
        scored |= branch_logps(model, members, forest)
    if is_sharded(model):
        for part in gather_objects(scored):
            scored |= part
    logps = torch.stack([scored[item.id] for item in items])  # (T, K)
    gold = [turn.strategy for dialogue in dialogues for turn in dialogue.supporter_turns()]
    counts = expected_confusion(temper(logps, 0.7, 0.95).numpy(), gold, strategies)
    scores = scores_of_confusion(counts)
    return {
        "valid/nll": negative_log_likelihood(logps.numpy(), gold, strategies),
        "valid/accuracy": scores.accuracy,
        "valid/Q": scores.macro_f1,
        "valid/B": bias_of_confusion(counts).bias,
    }
