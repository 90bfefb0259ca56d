"""The files of a base model: where they lie, whether they are whole, and what identifies them."""

import hashlib
import json
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from desc import DescError
from desc.storage import zoo

READ = ("*.json", "*.model", "*.txt", "*.jinja")  # what is read of a model's files, beside weights
# Of these, the ones that decide what a model reads and writes; people may keep notes beside them.
DECISIVE = ("config.json", "generation_config.json", "*token*.json", "*vocab*", "merges.txt")
DECISIVE += ("*template*.json", "*.model", "*.jinja")
POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has not fetched
WHOLE = 1 << 20  # bytes of a tensor up to which all of it is hashed
SAMPLE = 4096  # bytes that are hashed at each of PLACES in a larger tensor
PLACES = 4


def locate(name: str, weights: bool = True) -> Path:
    """The folder with the files of "toy", "smollm2", a folder, or a Hub id, which is fetched once;
    without `weights` its small files alone.

    Raises DescError if it cannot be had."""
    place = zoo.locate(name)
    if Path(place).is_dir():
        return Path(place)
    files = [*READ, "*.safetensors"] if weights else list(READ)
    try:
        folder = snapshot_download(
            place, allow_patterns=files, ignore_patterns=["*/*", "consolidated*"]
        )
    except Exception as error:  # the Hub's errors have no common base that says "offline"
        reason = str(error).strip().partition("\n")[0]
        raise DescError(
            f"model {name}: cannot be loaded: it is no folder, and the Hub has none of this name or"
            f" is out of reach ({reason})"
        ) from None
    return Path(folder)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights: those that the index names, else
    model.safetensors. Others beside them are left alone.

    Raises DescError if there are none, or one is missing."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():  # which Transformers prefers, too
        return [folder / "model.safetensors"]
    if not index.exists():
        raise DescError(f"{folder} holds no model.safetensors; only safetensors are read")
    refuse_pointer(index)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError):
        names = []
    if not names:
        raise DescError(f"{index} names no weights, or is cut off; fetch it again")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DescError(f"{folder} lacks {missing[0]}, which its index names; fetch it again")
    return [folder / name for name in names]


def small_files(folder: Path) -> list[Path]:
    """The files of a model beside its weights, of which each is what it should be.

    Raises DescError if one is only a pointer, or if the folder is an adapter's: Transformers would
    load the adapter with the model, without a word."""
    if (folder / "adapter_config.json").exists():
        raise DescError(
            f"{folder} holds an adapter (adapter_config.json); give its base model, or merge them"
        )
    files = [path for path in sorted(folder.iterdir()) if any(map(path.match, READ))]
    files = [path for path in files if path.is_file()]
    for path in files:
        refuse_pointer(path)
    return files


def refuse_pointer(path: Path) -> None:
    """Raises DescError if a file is only Git LFS's pointer to it."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise DescError(f"{path} is a pointer of Git LFS; run `git lfs pull` in its folder")


def read_header(path: Path) -> tuple[bytes, dict[str, dict]]:
    """(the header's bytes, {tensor: its entry}) of a safetensors file.

    Raises DescError if the file is cut off, or no safetensors file."""
    refuse_pointer(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, size))
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        end = None
    if end != size:
        raise DescError(f"{path} is cut off, or no safetensors file; fetch it again")
    return header, entries


def base_digest(name: str) -> str:
    """A hash that identifies a base model: of its configuration, tokenizer and chat template, and
    of its weights' headers and samples of each tensor.

    So the same model has the same digest on every machine, whatever version of Transformers has
    written its files (toy and smollm2 are made on each), and another one in the same folder has
    another. Raises DescError if a file is cut off or was not fetched, or if the folder holds an
    adapter."""
    folder = locate(name)
    digest = hashlib.sha256()
    for path in small_files(folder):
        if not any(map(path.match, DECISIVE)):
            continue
        text = re.sub(rb'"transformers_version": *"[^"]*"', b"", path.read_bytes())
        digest.update(path.name.encode() + b"\0" + text)
    for path in weight_files(folder):
        header, entries = read_header(path)
        digest.update(header)
        with open(path, "rb") as file:
            for entry in entries.values():
                begin, end = entry["data_offsets"]
                for place in sampled_places(end - begin):
                    file.seek(8 + len(header) + begin + place.start)
                    digest.update(file.read(len(place)))
    return digest.hexdigest()[:16]


def sampled_places(size: int) -> list[range]:
    """The bytes of a tensor that its model's digest depends on."""
    if size <= WHOLE:
        return [range(size)]
    step = (size - SAMPLE) // (PLACES - 1)
    return [range(i * step, i * step + SAMPLE) for i in range(PLACES)]
