"""Checkpoints: where a run goes on after a kill. Tensors and facts in one safetensors file, so that
no pickle is ever loaded."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from desc import DescError
from desc.storage.files import write_bytes

KEPT = 2  # should the newest be damaged, the one before it is used


def refuse_differing(path: Path, before: dict, settings: dict) -> None:
    """Raises DescError where what is half done in `path` was begun with other settings, naming
    them."""
    if differing := [key for key in settings if before.get(key) != settings[key]]:
        raise DescError(
            f"{path} was begun with another {', '.join(differing)}: run with the same, or delete it"
            " to start anew"
        )


def _digest(facts: dict, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_checkpoint(folder: Path, facts: dict, tensors: dict[str, torch.Tensor]) -> None:
    """FOLDER/STEP.safetensors, whole or not at all; of the older ones the newest stays. `facts` are
    JSON with step and settings."""
    path = folder / f"{facts['step']:08d}.safetensors"
    write_bytes(
        path,
        save(tensors, metadata={"desc": json.dumps({**facts, "digest": _digest(facts, tensors)})}),
    )
    paths = sorted(folder.glob("*.safetensors"))
    here = paths.index(path)
    # a later one can only be damaged
    for other in paths[: max(0, here + 1 - KEPT)] + paths[here + 1 :]:
        other.unlink()


def checkpoint_settings(folder: Path) -> dict:
    """The settings of the run whose checkpoints lie in `folder`; {} if none can be read."""
    for path in sorted(folder.glob("*.safetensors"), reverse=True):
        with suppress(SafetensorError, OSError, ValueError, KeyError, TypeError):
            with safe_open(path, "pt") as file:
                return json.loads(file.metadata()["desc"])["settings"]
    return {}


def read_checkpoint(folder: Path, settings: dict) -> tuple[dict, dict[str, torch.Tensor]] | None:
    """(facts, tensors) of the newest checkpoint that is whole; None where there is none at all.

    Raises DescError where none is whole, and where its settings are not `settings`, naming those
    that differ."""
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
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            print(f"{path} is damaged and left aside ({error})")
            continue
        refuse_differing(folder, facts["settings"], settings)
        return facts, tensors
    if paths:
        raise DescError(f"{folder}: no checkpoint can be read; delete it to start anew")
    return None
