"""Functions that the two training loops share."""

import math
import random
import time
from pathlib import Path
from typing import TypeVar

import torch

from desc import DescError
from desc.esconv import Dialogue
from desc.files import append_line
from desc.metrics import bias_of_confusion, expected_confusion, negative_log_likelihood, scores_of_confusion
from desc.sampling import score_strategies, temper
from desc.strategies import Strategies

Thing = TypeVar("Thing")  # an Example or a Pair: whatever has a .dialogue


def make_batches(things: list[Thing], batch_size: int, share: str, seed: int, epoch: int) -> list[list[Thing]]:
    """A shuffled epoch. Sharing by dialogue keeps a dialogue's turns together, for a dialogue cut in two is read twice: a batch is
    then whole dialogues, closed when one more would take it further from `batch_size`."""
    shuffle = random.Random(f"{seed}/{epoch}").shuffle
    if share != "dialogue":
        things = list(things)
        shuffle(things)
        return [things[i : i + batch_size] for i in range(0, len(things), batch_size)]
    dialogues: dict[str, list[Thing]] = {}
    for thing in things:
        dialogues.setdefault(thing.dialogue, []).append(thing)
    groups = list(dialogues.values())
    shuffle(groups)
    batches: list[list[Thing]] = [[]]
    for group in groups:
        size = len(batches[-1])
        if size and size + len(group) - batch_size > batch_size - size:
            batches.append([])
        batches[-1].extend(group)
    return batches


def make_optimizer(model, lr: float, weight_decay: float) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)


def make_schedule(optimizer, steps: int, warmup: float):
    """The rate rises linearly over the first `warmup` share of the steps, then falls to zero along half a cosine."""
    rising = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def update(optimizer, schedule, max_norm: float, where: str) -> float:
    """Clip, step, forget the gradients; returns their norm. Raises DescError, before stepping, where it is not finite."""
    parameters = optimizer.param_groups[0]["params"]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    if not math.isfinite(norm):
        raise DescError(f"{where}: the gradient is not finite; lower --lr, or look at these examples")
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def log(path: Path, record: dict, bar) -> None:
    """One line into metrics.jsonl. The tqdm bar shows a step's loss, and validation scores stay above it."""
    append_line(path, {"time": round(time.time(), 1), **record})
    if "loss" in record:
        bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
    else:
        bar.write("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))


def fresh_log(folder: Path) -> Path:
    """An empty metrics.jsonl in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    path.unlink(missing_ok=True)
    return path


def take(things: list[Thing], count: int) -> list[Thing]:
    """The first `count`; all where it is 0."""
    return things[:count] if count else things


def planner_scores(model, tokenizer, config, dialogues: list[Dialogue], strategies: Strategies) -> dict[str, float]:
    """The planner's exact scores on dialogues: negative log-likelihood of the gold strategy at T = 1, and accuracy, Q and B of the
    confusion matrix that sampling at the paper's T 0.7, top_p 0.95 has on average."""
    logps = [
        score_strategies(model, tokenizer, config.task, dialogue, strategies, config.max_length, config.max_tokens)
        for dialogue in dialogues
    ]
    logps = torch.cat(logps)
    gold = [dialogue.supporter(turn).strategy for dialogue in dialogues for turn in range(len(dialogue))]
    counts = expected_confusion(temper(logps, 0.7, 0.95).numpy(), gold, strategies)
    scores = scores_of_confusion(counts)
    return {
        "valid/nll": negative_log_likelihood(logps.numpy(), gold, strategies),
        "valid/accuracy": scores.accuracy,
        "valid/Q": scores.macro_f1,
        "valid/B": bias_of_confusion(counts).bias,
    }
