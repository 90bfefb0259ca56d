"""Functions that the two training loops share."""

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from desc import DescError
from desc.cli import TrainConfig, save_artefact
from desc.esconv import Dialogue
from desc.files import append_line
from desc.metrics import bias_of_confusion, expected_confusion, negative_log_likelihood, scores_of_confusion
from desc.modeling import compile_layers
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


def make_schedule(optimizer, steps: int, warmup: float):
    """The rate rises linearly over the first `warmup` share of the steps, then falls to zero along half a cosine."""
    rising = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@dataclass
class Run:
    """What a training loop holds besides its model."""

    epochs: list[list[list]]  # epochs of batches of examples or pairs
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    bar: tqdm
    metrics: Path  # metrics.jsonl
    best_at: Path  # where the adapter with the best validation score is kept
    last_at: Path  # and where the last one
    best: float = math.inf


def start(model, config: TrainConfig, things: list[Thing], folder: Path) -> Run:
    """Plan the batches; AdamW and its schedule for the trainable parameters; an empty metrics.jsonl in `folder`."""
    if config.compile:
        compile_layers(model)
    epochs = [make_batches(things, config.batch_size, config.share, config.seed, epoch) for epoch in range(config.epochs)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    steps = sum(map(len, epochs))
    best_at, last_at = (folder, folder / "last") if config.keep == "best" else (folder / "best", folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    print(f"{config.model}, {len(things)} turns in {steps} steps, into {folder}")
    bar = tqdm(total=steps, desc=f"{folder.name} {config.task}", dynamic_ncols=True)
    return Run(epochs, optimizer, make_schedule(optimizer, steps, config.warmup), bar, folder / "metrics.jsonl", best_at, last_at)


def validated(run: Run, model, config: TrainConfig, scores: dict, score: float) -> None:
    """Log validation scores, and keep the adapter where `score` is the lowest so far."""
    log(run, scores)
    if score < run.best:
        run.best = score
        save_artefact(model, config, run.best_at)


def finish(run: Run, model, config: TrainConfig) -> None:
    run.bar.close()
    save_artefact(model, config, run.last_at)
    print(f"best validation score {run.best:.4f}; the adapter that later steps find ({config.keep}) is in {run.metrics.parent}")


def update(run: Run, max_norm: float, batch: str) -> dict[str, float]:
    """Clip, step, forget the gradients; returns the rate and the gradients' norm.

    Raises DescError, before stepping, where the norm is not finite, which it is not either after a loss that is none."""
    rate = run.schedule.get_last_lr()[0]
    norm = float(torch.nn.utils.clip_grad_norm_(run.optimizer.param_groups[0]["params"], max_norm))
    if not math.isfinite(norm):
        raise DescError(f"step {run.bar.n + 1}: the gradient of {batch} is not finite; lower --lr, or look at these turns")
    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.bar.update()
    return {"lr": rate, "grad_norm": norm}


def log(run: Run, record: dict) -> None:
    """One line into metrics.jsonl. The bar shows a step's loss, and validation scores stay above it."""
    record = {"step": run.bar.n, **record}
    append_line(run.metrics, {"time": round(time.time(), 1), **record})
    if "loss" in record:
        run.bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
    else:
        run.bar.write("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))


def take(things: list[Thing], count: int) -> list[Thing]:
    """The first `count`; all where it is 0."""
    return things[:count] if count else things


def planner_scores(model, tokenizer, config: TrainConfig, dialogues: list[Dialogue], strategies: Strategies) -> dict[str, float]:
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
