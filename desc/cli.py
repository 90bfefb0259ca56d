"""What the five scripts share about flags, errors and where things lie."""

import math
import os
import signal
import sys
import time
import traceback
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

from desc import DescError, __version__
from desc.lora import load_adapter
from desc.modeling import native_dtype
from desc.prompts import TASKS
from desc.storage.adapters import has_adapter
from desc.storage.files import write_json
from desc.training import ranks
from desc.tree import SHARING


def flag(default, text: str, at_least: float = -math.inf, at_most: float = math.inf):
    """A field of a configuration: its default, what it does, and the range of a number."""
    return field(default=default, metadata={"help": text, "range": (at_least, at_most)})


@dataclass
class Config:
    """Flags of every script."""

    model: str = flag("smollm2", "smollm2, toy, a Hub id or a folder")
    strategies: str | None = flag(None, "a text file with another taxonomy, one strategy per line")
    out: str = flag("out", "the folder under which every artefact lies")
    seed: int = flag(
        0,
        "seeds the split, the adapters' start, the order of batches and all sampling",
        at_least=0,
        at_most=2**32 - 1,
    )
    dtype: Literal["auto", "bfloat16", "float32"] = flag(
        "auto",
        "of the frozen base model; auto is bfloat16 if this processor multiplies it natively, else"
        " float32; adapters are float32",
    )
    max_length: int = flag(
        2048,
        "tokens of prompt and completion; a longer dialogue loses its oldest exchanges",
        at_least=1,
    )

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass
class DataConfig(Config):
    """Flags of the scripts that read a data set."""

    data: str = flag(
        "sample", "sample (shipped), esconv (fetched from the Hub), or a file in ESConv's schema"
    )
    split_file: str | None = flag(
        None, "JSON with the indices of train, valid and test; without it a seeded 8:1:1"
    )
    eval_dialogues: int = flag(
        0, "held-out dialogues to use, the first of their split; 0 means all", at_least=0
    )
    max_tokens: int = flag(
        1024,
        "tree nodes in one forward pass, or twice the longest sequence where that is more; less"
        " needs less memory",
        at_least=1,
    )


@dataclass
class SampleConfig(Config):
    """Flags of the scripts that let a model answer. The defaults are the paper's, but for the
    length, which it leaves open."""

    temperature: float = flag(0.7, "of sampling; 0 takes the most likely", at_least=0)
    top_p: float = flag(
        0.95,
        "of sampling: only the likeliest tokens, or strategies, that hold this mass",
        at_least=1e-6,
        at_most=1,
    )
    max_new_tokens: int = flag(128, "the longest reply", at_least=1)


@dataclass
class AskConfig(DataConfig):
    """Flags of the scripts that may ask a server, or a local annotator."""

    annotator: Literal["none", "local", "endpoint"] = flag(
        "none", "who names errors: nobody, --model with OUT/annotate/sft, --endpoint"
    )
    endpoint: str | None = flag(
        None,
        "URL of a server that speaks OpenAI's protocol; a key is read from $DESC_API_KEY alone",
    )
    endpoint_model: str = flag(
        "", "the model's name there; {task} in it stands for sp, rg, vanilla, annotate or judge"
    )
    concurrency: int = flag(8, "calls to the endpoint at a time", at_least=1)
    timeout: float = flag(120, "seconds to wait for an answer of the endpoint", at_least=1)
    max_calls: int = flag(
        0,
        "calls to the endpoint that this run may make on all ranks, retries counted; 0 sets no"
        " limit",
        at_least=0,
    )


@dataclass
class TaskConfig(DataConfig):
    """Flags of the scripts that work on one module."""

    task: Literal[TASKS] = field(
        kw_only=True, metadata={"help": "planner, generator, or both in one model"}
    )

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.task


@dataclass
class TrainConfig(TaskConfig):
    """Flags of both training scripts."""

    batch_size: int = flag(
        32,
        "examples (SFT) or pairs (DPO) in a step; with --share dialogue whole dialogues, as near to"
        " it as they come",
        at_least=1,
    )
    share: Literal[SHARING] = flag(
        "dialogue", "which equal prefixes are read once; the loss of given examples is the same"
    )
    rank: int = flag(16, "LoRA's r", at_least=1)
    alpha: float = flag(16, "LoRA's alpha; the update is scaled by alpha / rank")
    dropout: float = flag(
        0.05, "on the input of the adapters that are trained", at_least=0, at_most=0.99
    )
    warmup: float = flag(
        0.1,
        "share of the steps in which the rate rises; afterwards it falls to zero along a cosine",
        at_least=0,
        at_most=1,
    )
    weight_decay: float = flag(0.0, "AdamW's, on the adapters", at_least=0)
    max_grad_norm: float = flag(1.0, "gradients of a larger norm are scaled down to it", at_least=0)
    eval_every: int = flag(50, "steps between scores on validation dialogues", at_least=0)
    save_every: int = flag(
        50,
        "steps between checkpoints; a run that was killed goes on from the last when it is started"
        " again",
        at_least=0,
    )
    recompute: bool = flag(
        False,
        "compute activations again in the backward pass instead of keeping them: less memory,"
        " slower",
    )
    keep: Literal["best", "last"] = flag(
        "best", "the adapter that later steps find; the other one lies in a folder beside it"
    )
    compile: bool = flag(
        False,
        "on a GPU: let PyTorch fuse the layers' element-wise work; the first steps take minutes",
    )
    estimate: int = flag(
        0,
        "print what the run costs on that many ranks (bytes per rank, steps, tokens), without"
        " loading weights, and stop",
        at_least=0,
    )
    show_example: bool = flag(
        False, "print the first example, what carries loss between » and «, and stop"
    )


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the description as it is."""


class Parser(HfArgumentParser):
    """Makes flags of a dataclass's fields; their ranges are checked after parsing."""

    def add_argument(self, *names, range=None, **settings):  # noqa: A002
        return super().add_argument(*names, **settings)


def parse(kind):
    """A configuration from the command line. An unknown flag ends the program with a usage message.

    Raises DescError if a number is out of its flag's range."""
    description = sys.modules["__main__"].__doc__
    parser = Parser(kind, description=description, formatter_class=HelpFormatter)
    config = kind(**vars(parser.parse_args()))
    for flagged in fields(config):
        low, high = flagged.metadata.get("range", (-math.inf, math.inf))
        value = getattr(config, flagged.name)
        if isinstance(value, (int, float)) and not low <= value <= high:
            allowed = f"from {low} to {high}"
            if high == math.inf:
                allowed = "a number" if low == -math.inf else f"at least {low}"
            raise DescError(f"--{flagged.name.replace('_', '-')} {value}: should be {allowed}")
    return config


def answer_settings(config, *irrelevant: str) -> dict:
    """The flags that change what a model says of a dialogue: all but those that never do, and those
    that are `irrelevant` to this script's answers."""
    never = {"data", "split_file", "strategies", "out", "max_tokens", "eval_dialogues"}
    never |= {"endpoint", "concurrency", "timeout", "max_calls", *irrelevant}
    return {name: value for name, value in asdict(config).items() if name not in never}


def choose_dtype(config: Config, device: torch.device, begun: dict | None = None) -> None:
    """Replace `--dtype auto`, and print what this run computes in, and where.

    A run that goes on keeps the dtype that it was `begun` with (its settings), so that it may go on
    on another kind of machine. Any other takes what `device` multiplies natively."""
    why = ""
    if config.dtype == "auto":
        native = str(native_dtype(device)).removeprefix("torch.")
        chosen = (begun or {}).get("dtype", native)
        config.dtype = ranks.gather_objects(chosen)[0]  # all ranks follow the first
        if config.dtype != native:
            why = ", as this run was begun"
        elif native == "float32":
            why = ", because bfloat16 would be emulated here"
    print(f"{config.model} computes in {config.dtype} on {device.type}{why}")


def progress(model, total: int, title: str, unit: str, done: int = 0) -> tqdm:
    """A bar of `total` units, on the first rank alone. It also counts the tokens that `model` reads
    (None: a server answers), so it moves within a unit, too. Away from a terminal it prints twice a
    minute."""
    bar = tqdm(
        total=total,
        initial=done,
        desc=title,
        unit=f" {unit}",
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,
        miniters=0,  # else update(0) would print nothing
        disable=ranks.rank() > 0,
    )
    read = 0

    def count(module, args, kwargs):
        nonlocal read
        read += kwargs["input_ids"].numel()
        bar.set_postfix_str(f"{read:,} tokens read", refresh=False)
        bar.update(0)

    if model is not None:
        model.register_forward_pre_hook(count, with_kwargs=True)
    return bar


def use_adapter(model, folder: Path, name: str, otherwise: str | None = None) -> bool:
    """Attach the adapter in `folder`, frozen. Returns whether there is one. Prints which adapter is
    used, or what happens `otherwise`.

    Raises DescError if there is none and `otherwise` is None."""
    if has_adapter(folder):
        print(f"uses the adapter {folder}")
        load_adapter(model, folder, name)
        return True
    if otherwise is None:
        raise DescError(f"finds no adapter in {folder}")
    print(f"finds no adapter in {folder}: {otherwise}")
    return False


def save_config(config, folder: Path) -> None:
    """config.json: the flags and versions that made what lies in `folder`."""
    versions = {"desc": __version__, "torch": torch.__version__}
    write_json(folder / "config.json", versions | asdict(config))


def markdown(lines: list[list[str]]) -> str:
    """A table in Markdown: its first line is the head."""
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])


def fail(problem: str) -> None:
    """Print one line and end with status 1, upon which torchrun ends the other ranks. If all ranks
    fail alike, the first reports it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if ranks.rank():
        time.sleep(2)
        problem = f"rank {ranks.rank()}: {problem}"
    print(f"error: {problem}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # at once: an orderly end would wait for ranks that wait for this one


def run(main) -> None:
    """Call main(); a DescError or a full disk ends in one line, an interrupt in none."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams are no files
            stream.reconfigure(errors="replace")  # Windows' consoles lack some signs, such as κ
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        main()
    except SystemExit as ended:
        if ranks.world_size() == 1:
            raise
        end_rank(ended.code or 0)
    except DescError as error:
        fail(str(error))
    except BrokenPipeError:  # whoever reads, `| head` say, has seen enough
        os._exit(141)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(130)  # at once: an orderly end would wait for calls to an endpoint
    except Exception:
        if ranks.world_size() == 1:
            raise
        fail(traceback.format_exc())
    if ranks.world_size() > 1:
        end_rank(0)


def end_rank(status: int) -> None:
    """End one of several processes at once: in an orderly end gloo's threads may abort a process
    that has done its work, and torchrun would report it as failed."""
    ranks.leave_ranks()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
