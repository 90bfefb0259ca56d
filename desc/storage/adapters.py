"""LoRA adapters on disk, in PEFT's format: a folder with its two files, read by PEFT and vLLM too.

What the tensors mean is desc/lora.py's business; here are names, files and settings."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from desc import DescError
from desc.storage.files import parse, read_text, write_bytes, write_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CHAT_TEMPLATE = "chat_template.jinja"  # beside them, if it is another than the base's own
PREFIX = "base_model.model."  # what PEFT puts before a module's name
# PEFT's settings at which an adapter is plain LoRA. An adapter with any other is refused, because
# it computes something else.
PLAIN = {
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
# Newer or rarer settings, refused too if they are set, but never written.
UNSUPPORTED = (
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
)
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", None)  # others change the base, too
LARGEST = 1_000_000  # r or lora_alpha: no adapter has more, so a larger number is damage
REQUIRED = {"r": int, "lora_alpha": (int, float), "target_modules": (list, str)}


def write_adapter(folder: Path, settings: dict, halves: dict[str, torch.Tensor]) -> None:
    """Write an adapter. `halves` maps "MODULE.lora_A" (r, in) and "MODULE.lora_B" (out, r) to
    tensors; `settings` are PEFT's r, lora_alpha, target_modules and base_model_name_or_path."""
    tensors = {f"{PREFIX}{name}.weight": half.contiguous() for name, half in halves.items()}
    always = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_dropout": 0.0}
    write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG, always | {"inference_mode": True} | PLAIN | settings)


def read_adapter(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(settings, tensors by their names in the file) of an adapter that PEFT or we have written.

    Raises DescError if a file is missing or broken, if the adapter is anything but plain LoRA, or
    if a value is not finite."""
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise DescError(f"{folder}: holds no readable LoRA adapter ({error})") from None
    kind = settings.get("peft_type") if isinstance(settings, dict) else "no object"
    if kind != "LORA":
        raise DescError(f"{folder}: {CONFIG} describes no LoRA adapter ({kind})")
    wrong = [name for name, kind in REQUIRED.items() if not isinstance(settings.get(name), kind)]
    if not wrong and not all(isinstance(name, str) for name in settings["target_modules"]):
        wrong = ["target_modules"]
    if not wrong:  # a float must hold their quotient, and NaN is no number from 0 on
        wrong = [name for name in ("r", "lora_alpha") if not 0 < settings[name] <= LARGEST]
    if wrong:
        raise DescError(f"{folder}: {CONFIG} has no valid {', '.join(map(repr, wrong))}")
    if settings.get("init_lora_weights", True) not in PLAIN_INITS:
        init = settings["init_lora_weights"]
        raise DescError(
            f"{folder}: init_lora_weights is {init!r}, which changes the base's weights too"
        )
    extended = [name for name in (*PLAIN, *UNSUPPORTED) if not is_plain(settings, name)]
    if extended:
        raise DescError(
            f"{folder}: uses {', '.join(extended)}, which desc's plain LoRA does not compute"
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise DescError(f"{folder}: {name} holds values that are no finite numbers")
    return settings, tensors


def is_plain(settings: dict, name: str) -> bool:
    """Whether a setting is absent, empty (None, False, {}), or has the value of plain LoRA."""
    value = settings.get(name)
    return not value or value == PLAIN.get(name)


def base_name(folder: Path) -> str:
    """What an adapter's configuration calls its base model; "" if it does not say."""
    settings = parse(read_text(folder / CONFIG), f"{folder / CONFIG}:")
    name = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    return str(name or "")


def has_adapter(folder: Path) -> bool:
    """Whether there is an adapter. Raises DescError if there is half of one."""
    there = [name for name in (WEIGHTS, CONFIG) if (folder / name).exists()]
    if len(there) == 1:
        raise DescError(
            f"{folder}: holds half an adapter, {there[0]} alone; train it again, or bring the other"
            " file back"
        )
    return bool(there)


def adapter_digest(folder: Path) -> str:
    """A hash of an adapter's two files, to tell one from another; "" if there is none.

    Raises DescError if there is half of one."""
    if not has_adapter(folder):
        return ""
    files = [(folder / name).read_bytes() for name in (WEIGHTS, CONFIG)]
    return hashlib.sha256(b"".join(files)).hexdigest()
