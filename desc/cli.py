"""What the five scripts share while they run: dtype, progress, adapters, errors in one line."""

import errno
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging

from desc import DescError, __version__
from desc.domain import ESCONV, READ_BY
from desc.flags import Config
from desc.lora import load_adapter
from desc.modeling import load, native_dtype
from desc.prompts import HISTORIES, STRATEGY_PLACES, Layout
from desc.storage.adapters import CHAT_TEMPLATE, base_name, has_adapter
from desc.storage.base import base_digest
from desc.storage.files import claim_folder, parse, read_text, write_json
from desc.training import ranks

bars: list[tqdm] = []  # of this run
OUT_OF_MEMORY = (
    "out of memory. Training needs less with a smaller --max-tokens or with --recompute, mining and"
    " evaluation with a smaller --max-tokens or --max-new-tokens; --batch-size changes little. The"
    " same command then goes on from where it was"
)


def resolve_auto(config: Config, device: torch.device, begun: dict | None = None) -> None:
    """Replace `--dtype auto` and `--date auto`, and print what this run computes in, and where.

    A run that goes on keeps the dtype and the date that it was `begun` with (its settings), so that
    it may go on another day, on another kind of machine. Any other takes what `device` multiplies
    natively, and today. Raises DescError if --date is no date."""
    native = str(native_dtype(device)).removeprefix("torch.")
    chosen = {"dtype": native, "date": date.today().isoformat()}
    begun = begun or {}
    if begun.get("dtype") in ("bfloat16", "float32"):  # else damaged, as the run will find
        chosen["dtype"] = begun["dtype"]
    if is_date(begun.get("date")):
        chosen["date"] = begun["date"]
    chosen = ranks.gather_objects(chosen)[0]  # all ranks follow the first
    why = ""
    if config.dtype == "auto":
        config.dtype = chosen["dtype"]
        if config.dtype != native:
            why = ", as this run was begun"
        elif native == "float32":
            why = ", because bfloat16 would be emulated here"
    if config.date == "auto":
        config.date = chosen["date"]
    if not is_date(config.date):
        raise DescError(f"--date {config.date}: should be auto or a date like 2026-01-31")
    print(f"{config.model} computes in {config.dtype} on {device.type}{why}")


def is_date(day) -> bool:
    """Whether a value is a date in ISO 8601."""
    try:
        date.fromisoformat(day)
    except (ValueError, TypeError):
        return False
    return True


def claim_folders(*folders: Path) -> None:
    """Make this run the only writer of these folders. Raises DescError if another writes there."""
    if ranks.rank() == 0:
        for folder in dict.fromkeys(folders):
            claim_folder(folder)


def load_model(config: Config, device: torch.device, empty: bool = False):
    """(model, tokenizer) as the flags say; desc.modeling.load says what `empty` means."""
    read_as = config.max_length, config.date, config.read_chat_template()
    return load(config.model, config.torch_dtype, device, empty, *read_as)


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
    bars.append(bar)
    read = 0

    def count(module, args, kwargs):
        nonlocal read
        read += kwargs["input_ids"].numel()
        bar.set_postfix_str(f"{read:,} tokens read", refresh=False)
        bar.update(0)

    if model is not None:
        model.register_forward_pre_hook(count, with_kwargs=True)
    return bar


def use_adapter(
    config: Config,
    model,
    folder: Path,
    task: str,
    otherwise: str | None = None,
    name: str | None = None,
) -> bool:
    """Attach the adapter in `folder`, which is used for `task`, as `name` (by default the task's),
    frozen. Returns whether there is one. Prints which adapter is used, or what happens `otherwise`.

    Raises DescError if there is none and `otherwise` is None, or if it was trained for another
    task, on another base, for another domain, with another layout of prompts, or with another chat
    template."""
    if has_adapter(folder):
        made_with = read_config(folder)
        if made_with.get("task", task) != task:
            raise DescError(f"{folder}: was trained for {made_with['task']}, not for {task}")
        refuse_other_base(model, folder, made_with.get("base"))
        refuse_other_prompts(config, folder, made_with)
        refuse_other_template(config, folder, made_with)
        print(f"uses the adapter {folder}")
        load_adapter(model, folder, name or task)
        return True
    if otherwise is None:
        raise DescError(f"finds no adapter in {folder}: train it first, or ask for the base model")
    print(f"finds no adapter in {folder}: {otherwise}")
    return False


def read_config(folder: Path) -> dict:
    """The config.json of a folder that we made; {} if it has none."""
    path = folder / "config.json"
    made_with = parse(read_text(path), f"{path}:") if path.exists() else None
    return made_with if isinstance(made_with, dict) else {}


def refuse_other_prompts(config: Config, folder: Path, made_with: dict) -> None:
    """Raises DescError if what lies in `folder` was made for prompts that the flags do not make.

    They differ if the module reads another domain, which before --domain was ESConv's, or if its
    prompts are laid out in another way."""
    module = made_with.get("task")
    if made_with.get("strategies"):
        raise DescError(
            f"{folder}: was made with --strategies, which --domain has replaced; make it again"
        )
    if module in tuple(READ_BY):
        digest = made_with.get("domain_digest", ESCONV.digest(module))
        if digest != config.read_domain().digest(module):
            file = made_with.get("domain")
            advice = f"give --domain {file} as it was, or make it again"
            if not file:
                advice = "give no --domain, or make it again" if config.domain else "make it again"
            raise DescError(
                f"{folder}: was made for another domain than {config.domain or 'ESConv'}; {advice}"
            )
    for flag, made in asdict(layout_of(folder, made_with, config.layout)).items():
        if made != getattr(config.layout, flag):
            given = f"--{flag.replace('_', '-')} {made}"
            raise DescError(f"{folder}: was made with {given}; give that flag, or make it again")


def layout_of(folder: Path, made_with: dict, given: Layout) -> Layout:
    """How the prompts are laid out for which what lies in `folder` was made: rg's by --strategy-at,
    sp's by --history. All else is as `given`, and so is what others made.

    Before these flags the strategy stood in the system message, and the history was one text.
    Raises DescError if config.json has a value that the flag does not know."""
    layout = given
    if made_with.get("task") == "rg":
        layout = replace(given, strategy_at=made_with.get("strategy_at", "system"))
    elif made_with.get("task") == "sp":
        layout = replace(given, history=made_with.get("history", "text"))
    if layout.strategy_at not in STRATEGY_PLACES or layout.history not in HISTORIES:
        raise DescError(f"{folder / 'config.json'}: knows no {layout}; make it again")
    return layout


def refuse_other_template(config: Config, folder: Path, made_with: dict) -> None:
    """Raises DescError if the adapter in `folder` was trained with another chat template.

    What no entry means is the model's own, which belongs to the base's digest. Of an adapter that
    others made the template is not known."""
    if made_with and made_with.get("template_digest") != config.template_digest():
        advice = "give no --chat-template"
        if made_with.get("template_digest"):
            advice = f"give --chat-template {folder / CHAT_TEMPLATE}"
        raise DescError(
            f"{folder}: was trained with another chat template; {advice}, or train it again"
        )


def refuse_other_base(model, folder: Path, made_for: str | None) -> None:
    """Raises DescError if the adapter in `folder` was trained on another base than `model`.

    Beside our own adapters stands the base's digest, `made_for`. Of others only the base's name is
    known, and a model may have several, so another name is only printed."""
    if made_for and made_for != base_digest(model.name_or_path):
        raise DescError(
            f"{folder}: was trained on another base than {model.name_or_path}; give its --model, or"
            f' delete "base" from its config.json if you know that the weights are the same'
        )
    name = base_name(folder)
    if not made_for and name and Path(name).name != Path(model.name_or_path).name:
        print(f"{folder}: was trained on {name}; {model.name_or_path} should be the same model")


def save_config(config, folder: Path, base: str = "") -> None:
    """config.json: the flags, versions, base model, domain and chat template (their digests) that
    made what lies in `folder`."""
    versions = {"desc": __version__, "torch": torch.__version__, "base": base}
    versions["domain_digest"] = config.read_domain().digest(config.task)
    versions["template_digest"] = config.template_digest()
    write_json(folder / "config.json", versions | asdict(config))


def markdown(lines: list[list[str]]) -> str:
    """A table in Markdown: its first line is the head."""
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])


def printable(problem: str) -> str:
    """An error as it may be shown: without a file's or a server's control characters, and without
    the middle of a very long value."""
    shown = "".join(sign if sign.isprintable() or sign == "\n" else "\ufffd" for sign in problem)
    return shown if len(shown) <= 4000 else f"{shown[:1000]} … {shown[-1000:]}"


def fail(problem: str) -> None:
    """Print one line and end with status 1, upon which torchrun ends the other ranks. If all ranks
    fail alike, the first reports it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for bar in bars:
        bar.close()  # so that the line does not begin at the end of a bar
    problem = printable(problem)
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
        if not ranks.has_joined():
            raise
        end_rank(ended.code or 0)
    except DescError as error:
        fail(str(error))
    except BrokenPipeError:  # whoever reads, `| head` say, has seen enough
        os._exit(141)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            fail(
                f"{error.filename}: the disk is full; what was written before is whole, and the"
                " same command goes on from there"
            )
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (torch.OutOfMemoryError, MemoryError):
        fail(OUT_OF_MEMORY)
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(130)  # at once: an orderly end would wait for calls to an endpoint
    except Exception as error:
        if "can't allocate memory" in str(error):  # PyTorch's error on a CPU is of no class
            fail(OUT_OF_MEMORY)
        if ranks.world_size() == 1:
            raise
        fail(traceback.format_exc())
    if ranks.has_joined():
        end_rank(0)


def end_rank(status: int) -> None:
    """End one of several processes at once: in an orderly end gloo's threads may abort a process
    that has done its work, and torchrun would report it as failed."""
    ranks.leave_ranks()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
