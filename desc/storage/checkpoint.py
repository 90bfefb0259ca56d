"""Checkpoints, from which a run goes on after a kill: tensors and facts in one safetensors file, so
that no pickle is ever loaded."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from desc import DescError
from desc.storage.files import write_bytes

# What reading a damaged one raises.
UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError)
KEPT = 2  # checkpoints; if the newest is damaged, the one before it is used


def differing(begun: dict, settings: dict) -> list[str]:
    """The names of the settings that are others than in `begun`, where no entry means None."""
    return [name for name in settings if begun.get(name) != settings[name]]


def refuse_differing(path: Path, begun, settings: dict) -> None:
    """Raises DescError if what is half done in `path` was `begun` with other settings, naming
    them."""
    if not isinstance(begun, dict):
        raise DescError(f"{path}: its settings are damaged; delete it to start anew")
    if names := differing(begun, settings):
        raise DescError(
            f"{path} was begun with another {', '.join(names)}: run with the same, or delete it"
            " to start anew"
        )


def _digest(facts: dict, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_checkpoint(folder: Path, facts: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write FOLDER/STEP.safetensors, whole or not at all. Of the older ones the newest stays.
    `facts` are JSON, with the step and the settings."""
    path = folder / f"{facts['step']:08d}.safetensors"
    signed = json.dumps({**facts, "digest": _digest(facts, tensors)})
    write_bytes(path, save(tensors, metadata={"desc": signed}))
    paths = sorted(folder.glob("*.safetensors"))
    here = paths.index(path)
    too_old = paths[: max(0, here + 1 - KEPT)]
    later = paths[here + 1 :]  # they can only be damaged, since the run went on from before them
    for other in too_old + later:
        other.unlink()


def checkpoint_settings(folder: Path) -> dict:
    """The settings of the run whose checkpoints lie in `folder`; {} if none can be read."""
    for path in sorted(folder.glob("*.safetensors"), reverse=True):
        with suppress(*UNREADABLE):
            with safe_open(path, "pt") as file:
                settings = json.loads(file.metadata()["desc"])["settings"]
            if isinstance(settings, dict):
                return settings
    return {}


def read_checkpoint(folder: Path, settings: dict) -> tuple[dict, dict[str, torch.Tensor]] | None:
    """(facts, tensors) of the newest checkpoint that is whole; None if there is none at all.

    Raises DescError if none is whole, or if its settings are not `settings`, naming those that
    differ."""
    paths = sorted(folder.glob("*.safetensors"), reverse=True)
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["desc"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if facts["digest"] != _digest(
                {key: value for key, value in facts.items() if key != "digest"}, tensors
            ):
                raise ValueError("its digest is another")
        except UNREADABLE as error:
            print(f"{path} is damaged and left aside ({error})")
            continue
        refuse_differing(folder, facts["settings"], settings)
        return facts, tensors
    if paths:
        raise DescError(f"{folder}: no checkpoint can be read; delete it to start anew")
    return None
