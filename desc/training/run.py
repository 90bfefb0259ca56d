"""A training run: its optimizer and rate, its log, its best adapter and its checkpoints."""

import math
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from desc import DescError
from desc.calibration import PLANNED
from desc.cli import claim_folders, progress
from desc.exactness import check_tree
from desc.flags import TrainConfig, training_settings
from desc.modeling import one_line
from desc.sampling import seed_of
from desc.storage.base import base_digest
from desc.storage.checkpoint import read_checkpoint, write_checkpoint
from desc.storage.files import append_line, drop_torn_line, write_bytes, write_lines
from desc.storage.journal import read_metrics, work_key
from desc.training.artefacts import save_artefact, save_template, serving_advice
from desc.training.batches import all_batches
from desc.training.ranks import gather_objects, on_any_rank, rank, sum_over_ranks, wait_for_all
from desc.training.sharding import average_gradients, copy_whole, read_weights, shard, whole
from desc.training.speed import compile_layers, recompute_activations

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state besides the number of the step


def learning_rate(step: int, steps: int, warmup: float, peak: float) -> float:
    """Rises linearly over the first `warmup` share of the steps, then falls to zero along half a
    cosine."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@dataclass
class PendingStep:
    """A step whose numbers have not been read from the device yet."""

    step: int
    rate: float
    numbers: dict[str, torch.Tensor]  # on their way to the CPU
    copied: "torch.cuda.Event | None"  # when they are there
    trained_on: str  # its first and last turn or pair


@dataclass
class Run:
    """What a training loop holds besides its model. All of it but the bar follows from the
    configuration and a checkpoint."""

    batches: list[list]  # of examples or pairs, of all epochs
    trained: dict[str, torch.nn.Parameter]  # the adapter, by name
    optimizer: torch.optim.Optimizer
    folder: Path  # where the finished artefact will lie
    settings: dict  # what a checkpoint must have been made with
    bar: tqdm | None = None
    step: int = 0  # steps done
    best: float = math.inf  # the lowest validation score so far
    pending: PendingStep | None = None
    asked_to_stop: bool = False

    @property
    def work(self) -> Path:
        """The folder of a run under way: its metrics, the best adapter so far, checkpoints. What an
        earlier run left in `folder` stays until this one is whole."""
        return self.folder / "checkpoints"

    def title(self) -> str:
        return " ".join(self.folder.parts[-2:])  # "sp sft"

    def examples_done(self) -> int:
        return sum(map(len, self.batches[: self.step]))


def begin(
    model,
    config: TrainConfig,
    examples: list,
    unit: str,
    folder: Path,
    device: torch.device,
    reference: str = "",
) -> Run:
    """Plan the batches, shard the model over ranks if it is empty, and make AdamW for what is
    trainable.

    The run goes on from a checkpoint that an earlier one left in FOLDER/checkpoints, if it had the
    same training_settings, the same `examples` and the same `reference` (its adapter's digest).
    Raises DescError if they were others. From here on SIGTERM ends the run with a checkpoint, after
    the step at hand."""
    if config.compile:
        compile_layers(model, device)
    if config.recompute:
        recompute_activations(model)
    if any(p.is_meta for p in model.parameters()):  # its ranks read it once it is sharded
        shard(model, device)
        read_weights(model)
        with one_line(f"model {config.model}"):
            check_tree(model, config.max_length)
    batches = all_batches(examples, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adamw = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(trained.values(), **adamw)
    settings = training_settings(config) | {"base": base_digest(model.name_or_path)}
    settings["input"] = work_key(examples, reference)
    run = Run(batches, trained, optimizer, folder, settings)
    claim_folders(folder)
    resume(run)
    onwards = f", from step {run.step} on" if run.step else ""
    print(f"{len(examples)} {unit} in {len(batches)} steps, into {folder}{onwards}")
    run.bar = progress(model, sum(map(len, batches)), run.title(), unit, run.examples_done())

    def ask_to_stop(*_):
        run.asked_to_stop = True

    signal.signal(signal.SIGTERM, ask_to_stop)
    return run


def resume(run: Run) -> None:
    """Take over the newest checkpoint; without one begin a new metrics.jsonl."""
    metrics = run.work / "metrics.jsonl"
    checkpoint = read_checkpoint(run.work, run.settings)
    digests = gather_objects(checkpoint[0]["digest"] if checkpoint else None)
    if len(set(digests)) > 1:
        raise DescError(
            f"the ranks see different checkpoints in {run.folder}: --out must be a disk that all of"
            " them share"
        )
    if checkpoint is None:
        if rank() == 0:
            metrics.parent.mkdir(parents=True, exist_ok=True)
            write_lines(metrics, [])
        return
    facts, tensors = checkpoint
    run.step, run.best = facts["step"], facts["best"]
    for name, p in run.trained.items():
        copy_whole(p, tensors[name])
        state = {"step": torch.tensor(float(run.step), device=p.device)}
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(p)
            copy_whole(state[moment], tensors[f"{moment}.{name}"])
        run.optimizer.state[p] = state
    if rank() == 0:
        drop_torn_line(metrics)
        kept = [record for record in read_metrics(metrics) if record["step"] <= run.step]
        write_lines(metrics, kept)


def seed_dropout(run: Run, config: TrainConfig) -> None:
    """Before each step: dropout depends on seed, step and rank alone, so that a resumed run draws
    what an uninterrupted one draws."""
    torch.manual_seed(seed_of(config.seed, run.step, rank()))


def clip_and_step(
    run: Run, config: TrainConfig, sums: dict[str, torch.Tensor], trained_on: str
) -> None:
    """Average the gradients over ranks, clip them, take a step, forget them. `sums` are this rank's
    part of what to log. The logged norm is that before clipping.

    They are read one step later, so that a GPU never waits for the CPU. A gradient that is not
    finite is noticed then, before anything of it is saved."""
    rate = learning_rate(run.step, len(run.batches), config.warmup, config.lr)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    limit = config.max_grad_norm if config.max_grad_norm > 0 else math.inf
    average_gradients(list(run.trained.values()))
    norm = torch.nn.utils.clip_grad_norm_(run.trained.values(), limit)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.bar.update(run.examples_done() - run.bar.n)  # other ranks' share of this step
    write_pending(run)
    totals = sum_over_ranks(torch.stack([on_device(value, norm.device) for value in sums.values()]))
    totals = torch.cat([totals, whole(norm)[None]]).to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream().record_event() if norm.is_cuda else None
    numbers = dict(zip([*sums, "grad_norm"], totals))
    run.pending = PendingStep(run.step, rate, numbers, copied, trained_on)


def on_device(value, device: torch.device) -> torch.Tensor:
    """A number as an fp32 scalar there. torch.full fills it in place; a copy from the CPU would
    wait for the device."""
    if torch.is_tensor(value):
        return value.float()
    return torch.full((), float(value), device=device)


def write_pending(run: Run) -> None:
    """Log the pending step's numbers. Raises DescError if one is not finite."""
    if run.pending is None:
        return
    pending, run.pending = run.pending, None
    if pending.copied:
        pending.copied.synchronize()
    numbers = {name: float(number) for name, number in pending.numbers.items()}
    if not all(map(math.isfinite, numbers.values())):
        raise DescError(
            f"step {pending.step}: the loss or the gradient of {pending.trained_on} is not finite;"
            " lower --lr, or look at these turns"
        )
    log(run, pending.step, numbers | {"lr": pending.rate})


def log(run: Run, step: int, record: dict) -> None:
    """Append a line to metrics.jsonl. The bar shows a step's loss; validation scores stay above
    it."""
    if rank() > 0:
        return
    stamped = {"time": round(time.time(), 3), "step": step, **record}
    append_line(run.work / "metrics.jsonl", stamped)
    if "loss" in record:
        run.bar.set_description(f"{run.title()}, loss {record['loss']:.4f}", refresh=False)
    else:
        scores = [f"{name} {value:.4f}" for name, value in record.items()]
        run.bar.write("  ".join([f"step {step}", *scores]))


def is_due(run: Run, every: int) -> bool:
    """Whether so many steps have passed again; 0 is never."""
    return every > 0 and run.step % every == 0


def keep_best(
    run: Run, model, config: TrainConfig, scores: dict, score: float, planned: list[dict] = ()
) -> None:
    """Log validation scores, and save the adapter if `score` is the lowest so far. What it
    `planned` (PlannedTurns.records) is saved beside it, and beside the last.

    Raises DescError if the score is not finite."""
    write_pending(run)
    log(run, run.step, scores)
    if on_any_rank(not math.isfinite(score)):
        raise DescError(f"step {run.step}: the validation score is not finite; lower --lr")
    is_best = on_any_rank(score < run.best)
    if is_best:
        run.best = score
        save_artefact(model, config, run.work / "best", run.settings["base"])
    if planned and rank() == 0:
        for name in ("best", "last") if is_best else ("last",):
            write_lines(run.work / name / PLANNED, planned)


def save_checkpoint_if_due(run: Run, every: int) -> None:
    """Save a checkpoint every so many steps, and if SIGTERM asked for it, which then ends the
    program."""
    stop = on_any_rank(run.asked_to_stop)
    if not is_due(run, every) and not stop:
        return
    write_pending(run)
    saved = {}
    for name, p in run.trained.items():
        tensors = {name: p.detach()}
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = run.optimizer.state[p][moment]
        for key, tensor in tensors.items():  # gathered one at a time, because devices are small
            tensor = whole(tensor)  # every rank must take part
            if rank() == 0:
                saved[key] = tensor.cpu()
    if rank() == 0:
        facts = {"step": run.step, "best": run.best, "settings": run.settings}
        write_checkpoint(run.work, facts, saved)
    if stop:
        # When one rank ends, torchrun ends the others, so all wait until the checkpoint is written.
        wait_for_all()
        run.bar.close()
        print(
            f"stopped after step {run.step} of {len(run.batches)}; the same command goes on from"
            f" there (its metrics and its best adapter so far are in {run.work})"
        )
        sys.exit(128 + signal.SIGTERM)


def finish(run: Run, model, config: TrainConfig) -> None:
    """Put the best and the last adapter in their places, and clear the folder of the run under way.

    A kill in between harms nothing: the same command does this again."""
    write_pending(run)
    run.bar.close()
    adapter_rank = save_artefact(model, config, run.work / "last", run.settings["base"])
    if rank() == 0:
        for name in ("best", "last"):
            place = run.folder if name == config.keep else run.folder / name
            for file in (run.work / name).iterdir():
                write_bytes(place / file.name, file.read_bytes())
            save_template(config, place)
        shutil.rmtree(run.folder / config.keep, ignore_errors=True)  # of a run with another --keep
        write_bytes(run.folder / "metrics.jsonl", (run.work / "metrics.jsonl").read_bytes())
        shutil.rmtree(run.work, ignore_errors=True)
    print(
        f"best validation score {run.best:.4f}; the adapter that later steps find ({config.keep})"
        f" is in {run.folder}"
    )
    advice = serving_advice(adapter_rank)
    if advice:
        print(advice)
