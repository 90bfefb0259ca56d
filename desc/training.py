"""Functions that the two training loops share."""

import hashlib
import math
import random
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from desc import DescError, distributed
from desc.checkpoint import read_checkpoint, write_checkpoint
from desc.cli import TrainConfig, progress, save_artefact
from desc.esconv import Dialogue
from desc.files import append_line, mend, read_lines, write_lines
from desc.metrics import (
    bias_of_confusion,
    expected_confusion,
    negative_log_likelihood,
    scores_of_confusion,
)
from desc.modeling import compile_layers, read_weights, recompute_activations
from desc.sampling import score_strategies, temper
from desc.strategies import Strategies

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state beside the step


def make_batches(things: list, batch_size: int, share: str, seed: int, epoch: int) -> list[list]:
    """A shuffled epoch of examples or pairs. Sharing by dialogue keeps its turns together, for a
    dialogue cut in two is read twice: a batch is then whole dialogues, closed when one more would
    take it further from `batch_size`."""
    shuffle = random.Random(f"{seed}/{epoch}").shuffle
    if share != "dialogue":
        things = list(things)
        shuffle(things)
        return [things[i : i + batch_size] for i in range(0, len(things), batch_size)]
    dialogues: dict[str, list] = {}
    for thing in things:
        dialogues.setdefault(thing.dialogue, []).append(thing)
    groups = list(dialogues.values())
    shuffle(groups)
    batches: list[list] = [[]]
    for group in groups:
        size = len(batches[-1])
        if size and size + len(group) - batch_size > batch_size - size:
            batches.append([])
        batches[-1].extend(group)
    return batches


def all_batches(things: list, config: TrainConfig) -> list[list]:
    """Of all epochs, one after another."""
    return [
        b
        for epoch in range(config.epochs)
        for b in make_batches(things, config.batch_size, config.share, config.seed, epoch)
    ]


def learning_rate(step: int, steps: int, warmup: float, peak: float) -> float:
    """Rises linearly over the first `warmup` share of the steps, then falls to zero along half a
    cosine."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@dataclass
class Run:
    """What a training loop holds besides its model. All of it but the bar follows from the
    configuration and a checkpoint."""

    batches: list[list]  # of examples or pairs, of all epochs
    trained: dict[str, torch.nn.Parameter]  # the adapter, by name
    optimizer: torch.optim.Optimizer
    folder: Path
    best_at: Path  # where the adapter with the best validation score is kept
    last_at: Path  # and where the last one
    settings: dict  # what a checkpoint must have been made with
    bar: tqdm = None
    step: int = 0  # done
    best: float = math.inf
    pending: tuple | None = None  # the step whose numbers have not been read from the device
    asked_to_stop: bool = False

    def title(self) -> str:
        return " ".join(self.folder.parts[-2:])  # "sp sft"

    def examples_done(self) -> int:
        return sum(map(len, self.batches[: self.step]))


def start(
    model,
    config: TrainConfig,
    things: list,
    unit: str,
    folder: Path,
    device: torch.device,
    more: str = "",
) -> Run:
    """Plan the batches, shard the model if there are several ranks, make AdamW for the trainable
    parameters; go on from a checkpoint that an earlier run with the same configuration, the same
    `things` and the same `more` left in FOLDER/checkpoints.

    Raises DescError where it was made with others. From here on SIGTERM ends the run with a
    checkpoint, after the step at hand."""
    if config.compile:
        compile_layers(model)
    if config.recompute:
        recompute_activations(model)
    if distributed.size() > 1:
        distributed.shard(model, device)
        read_weights(model)
    batches = all_batches(things, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    best_at, last_at = (
        (folder, folder / "last") if config.keep == "best" else (folder / "best", folder)
    )
    settings = asdict(config) | {"input": hashlib.sha256(f"{things}{more}".encode()).hexdigest()}
    del settings["save_every"]
    run = Run(batches, trained, optimizer, folder, best_at, last_at, settings)
    resume(run)
    since = f", from step {run.step} on" if run.step else ""
    print(f"{len(things)} {unit} in {len(batches)} steps, into {folder}{since}")
    run.bar = progress(model, sum(map(len, batches)), run.title(), unit, run.examples_done())

    def ask_to_stop(*_):
        run.asked_to_stop = True

    signal.signal(signal.SIGTERM, ask_to_stop)
    return run


def resume(run: Run) -> None:
    """Take over the newest checkpoint; without one begin a new metrics.jsonl."""
    metrics = run.folder / "metrics.jsonl"
    found = read_checkpoint(run.folder / "checkpoints", run.settings)
    if len(set(chain(*distributed.collect([found and found[0]["digest"]])))) > 1:
        raise DescError(
            f"the ranks see different checkpoints in {run.folder}: --out must be a disk that all of"
            " them share"
        )
    if found is None:
        if not distributed.rank():
            metrics.parent.mkdir(parents=True, exist_ok=True)
            write_lines(metrics, [])
        return
    facts, tensors = found
    run.step, run.best = facts["step"], facts["best"]
    for name, p in run.trained.items():
        distributed.place(p, tensors[name])
        moments = {key: torch.zeros_like(p) for key in MOMENTS}
        for key in MOMENTS:
            distributed.place(moments[key], tensors[f"{key}.{name}"])
        run.optimizer.state[p] = {"step": torch.tensor(float(run.step), device=p.device), **moments}
    if not distributed.rank():
        mend(metrics)
        write_lines(
            metrics, [record for record in read_lines(metrics) if record["step"] <= run.step]
        )


def ahead(prepare: Callable, batches: list) -> Iterator:
    """prepare(batch) of each, made in a thread while the caller trains on the one before."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for batch in batches:
            ready, coming = coming, pool.submit(prepare, batch)
            if ready:
                yield ready.result()
        if coming:
            yield coming.result()


def begin_step(run: Run, config: TrainConfig) -> None:
    """Dropout depends on seed, step and rank alone: a resumed run draws what an uninterrupted one
    draws."""
    torch.manual_seed(zlib.crc32(f"{config.seed}/{run.step}/{distributed.rank()}".encode()))


def update(run: Run, config: TrainConfig, sums: dict[str, torch.Tensor], batch: str) -> None:
    """Clip, step, forget the gradients. `sums` are this rank's part of what to log.

    They are read one step later, so that a GPU never waits for the CPU; a gradient that is not
    finite is noticed then, before anything of it is saved."""
    rate = learning_rate(run.step, len(run.batches), config.warmup, config.lr)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    norm = torch.nn.utils.clip_grad_norm_(run.trained.values(), config.max_grad_norm)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.bar.update(run.examples_done() - run.bar.n)  # other ranks' share of this step
    settle(run)
    values = [
        v.float() if torch.is_tensor(v) else torch.full((), float(v), device=norm.device)
        for v in sums.values()
    ]
    values = torch.cat([distributed.total(torch.stack(values)), distributed.whole(norm)[None]]).to(
        "cpu", non_blocking=True
    )
    copied = torch.cuda.current_stream().record_event() if norm.is_cuda else None
    run.pending = run.step, rate, dict(zip([*sums, "grad_norm"], values)), copied, batch


def settle(run: Run) -> None:
    """Write the pending step's numbers. Raises DescError where one is not finite."""
    if run.pending is None:
        return
    (step, rate, numbers, copied, batch), run.pending = run.pending, None
    if copied:
        copied.synchronize()
    if not all(map(math.isfinite, numbers.values())):
        raise DescError(
            f"step {step}: the loss or the gradient of {batch} is not finite; lower --lr, or look"
            " at these turns"
        )
    log(run, step, {name: float(number) for name, number in numbers.items()} | {"lr": rate})


def log(run: Run, step: int, record: dict) -> None:
    """One line into metrics.jsonl. The bar shows a step's loss, and validation scores stay above
    it."""
    if distributed.rank():
        return
    append_line(
        run.folder / "metrics.jsonl", {"time": round(time.time(), 3), "step": step, **record}
    )
    if "loss" in record:
        run.bar.set_description(f"{run.title()}, loss {record['loss']:.4f}", refresh=False)
    else:
        run.bar.write("  ".join([f"step {step}"] + [f"{k} {v:.4f}" for k, v in record.items()]))


def due(run: Run, every: int) -> bool:
    """Every so many steps; 0 is never."""
    return every > 0 and run.step % every == 0


def validated(run: Run, model, config: TrainConfig, scores: dict, score: float) -> None:
    """Log validation scores, and keep the adapter where `score` is the lowest so far."""
    settle(run)
    log(run, run.step, scores)
    if distributed.anyone(score < run.best):
        run.best = score
        save_artefact(model, config, run.best_at)


def survive(run: Run, every: int) -> None:
    """A checkpoint every so many steps, and on SIGTERM, which then ends the program."""
    stop = distributed.anyone(run.asked_to_stop)
    if not due(run, every) and not stop:
        return
    settle(run)
    tensors = {}
    for name, p in run.trained.items():
        for key, tensor in {
            name: p.detach(),
            **{f"{key}.{name}": run.optimizer.state[p][key] for key in MOMENTS},
        }.items():
            tensor = distributed.whole(tensor)  # on every rank
            if not distributed.rank():
                tensors[key] = tensor.cpu()
    if tensors:
        write_checkpoint(
            run.folder / "checkpoints",
            {"step": run.step, "best": run.best, "settings": run.settings},
            tensors,
        )
    if stop:
        # when one rank ends, torchrun ends the others: not before the checkpoint is written
        distributed.barrier()
        run.bar.close()
        print(
            f"stopped after step {run.step} of {len(run.batches)}; the same command goes on from"
            " there"
        )
        sys.exit(128 + signal.SIGTERM)


def finish(run: Run, model, config: TrainConfig) -> None:
    settle(run)
    run.bar.close()
    save_artefact(model, config, run.last_at)
    if not distributed.rank():
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    print(
        f"best validation score {run.best:.4f}; the adapter that later steps find ({config.keep})"
        f" is in {run.folder}"
    )


def planner_scores(
    model, tokenizer, config: TrainConfig, dialogues: list[Dialogue], strategies: Strategies
) -> dict[str, float]:
    """The planner's exact scores on dialogues: negative log-likelihood of the gold strategy at T =
    1, and accuracy, Q and B of the confusion matrix that sampling at the paper's T 0.7, top_p 0.95
    has on average."""
    logps = score_strategies(
        model, tokenizer, config.task, dialogues, strategies, config.max_length, config.max_tokens
    )
    gold = [
        dialogue.supporter(turn).strategy for dialogue in dialogues for turn in range(len(dialogue))
    ]
    counts = expected_confusion(temper(logps, 0.7, 0.95).numpy(), gold, strategies)
    scores = scores_of_confusion(counts)
    return {
        "valid/nll": negative_log_likelihood(logps.numpy(), gold, strategies),
        "valid/accuracy": scores.accuracy,
        "valid/Q": scores.macro_f1,
        "valid/B": bias_of_confusion(counts).bias,
    }
