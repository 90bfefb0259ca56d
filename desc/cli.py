"""What the five scripts share while they run: dtype, progress, adapters, errors in one line."""

import os
import signal
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging

from desc import DescError, __version__
from desc.flags import Config
from desc.lora import load_adapter
from desc.modeling import native_dtype
from desc.storage.adapters import has_adapter
from desc.storage.files import write_json
from desc.training import ranks


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
