"""LoRA by hand: adapters beside frozen linear layers, several at once, each switched off at will,
saved as PEFT saves them.

y = W x + Σ_adapters (alpha / r) B A x, with A (r, in) random, B (out, r) zero at first (Hu et al.
2021, section 4.1), so that a fresh adapter changes nothing, to the bit."""

import hashlib
import json
import math
import re
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from desc import DescError, distributed
from desc.files import write_bytes, write_json

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # what PEFT puts before a module's name
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Settings of PEFT's that would change the arithmetic above; an adapter that uses one is refused.
PLAIN = {
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
}
PLAIN |= {"modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}
# Newer or rarer ones, refused too, but not written.
BEYOND = dict.fromkeys(
    [
        "layer_replication",
        "alora_invocation_tokens",
        "trainable_token_indices",
        "target_parameters",
        "use_qalora",
    ]
)


class Adapter(nn.Module):
    """What (alpha / r) B A dropout(x) needs, for one linear layer; A (r, in) and B (out, r) in
    fp32."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        # Drawn on the CPU: the same start on every device and rank, also where the weight has no
        # values yet.
        A = nn.init.kaiming_uniform_(torch.empty(rank, linear.in_features), a=math.sqrt(5))
        device = torch.device("cpu") if linear.weight.is_meta else linear.weight.device
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)


class LoRALinear(nn.Linear):
    """A linear layer with adapters beside its frozen weight. It takes over the weight itself, so
    state-dict keys stay the model's."""

    def __init__(self, linear: nn.Linear):
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.weight, self.bias = linear.weight, linear.bias
        self.adapters = nn.ModuleDict()
        self.off: set[str] = set()

    def forward(self, x):
        """All adapters in two products, B₁A₁x + B₂A₂x = [B₁ B₂] [A₁; A₂] x. One that is trained but
        off has its B put to zero and is not left out: policy and reference run the same kernels on
        the same shapes, and agree to the bit where they should."""
        y = super().forward(x)
        adapters = {
            name: a
            for name, a in self.adapters.items()
            if name not in self.off or a.A.requires_grad
        }
        if not adapters:
            return y
        # Cast at use: the products run in the base model's dtype, the optimizer sees fp32.
        A = [adapter.A.to(x.dtype) for adapter in adapters.values()]
        B = [
            adapter.B * (0.0 if name in self.off else adapter.scale)
            for name, adapter in adapters.items()
        ]
        if any(adapter.dropout.p for adapter in adapters.values()):  # each has an input of its own
            inner = torch.cat(
                [F.linear(adapter.dropout(x), a) for adapter, a in zip(adapters.values(), A)],
                dim=-1,
            )
        else:
            inner = F.linear(x, torch.cat(A))
        return y + F.linear(inner, torch.cat(B, dim=1).to(x.dtype))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that carry adapters, by module name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }


def _attach(model, module_name: str, name: str, rank: int, alpha: float, dropout: float) -> Adapter:
    layer = model.get_submodule(module_name)
    if not isinstance(layer, LoRALinear):
        layer = LoRALinear(layer)
        model.set_submodule(module_name, layer)
    if name in layer.adapters:
        raise ValueError(f"there is an adapter {name!r} already")
    layer.adapters[name] = Adapter(layer, rank, alpha, dropout).train(model.training)
    return layer.adapters[name]


def add_adapter(
    model, name: str, rank: int = 16, alpha: float = 16, dropout: float = 0.0, targets=TARGETS
) -> None:
    """Freeze the model and put a fresh, trainable adapter on every linear layer whose last name is
    in `targets`.

    Raises DescError where a target names no layer."""
    found = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n.rpartition(".")[2] in targets
    ]
    if missing := set(targets) - {n.rpartition(".")[2] for n in found}:
        linears = sorted(
            {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        )
        raise DescError(
            f"no linear layer is called {', '.join(sorted(missing))}; this model has"
            f" {', '.join(linears)}"
        )
    model.requires_grad_(False)
    for module_name in found:
        _attach(model, module_name, name, rank, alpha, dropout)


@contextmanager
def adapter_off(model, *names: str):
    """Within this context the model answers as if the adapters `names` were not there; also
    restored after an exception."""
    layers = lora_layers(model).values()
    before = [set(layer.off) for layer in layers]
    try:
        for layer in layers:
            layer.off |= set(names)
        yield
    finally:
        for layer, off in zip(layers, before):
            layer.off = off


def adapter_only(model, *names: str):
    """adapter_off for all adapters but `names`."""
    return adapter_off(
        model,
        *{name for layer in lora_layers(model).values() for name in layer.adapters} - set(names),
    )


def merge_adapters(model) -> None:
    """Fold all adapters into the weights, in fp32 and rounded once, and leave plain linear
    layers."""
    for name, layer in lora_layers(model).items():
        delta = sum(a.scale * (a.B @ a.A) for a in layer.adapters.values())
        plain = nn.Linear(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta"
        )
        plain.weight = nn.Parameter(
            (layer.weight.float() + delta).detach().to(layer.weight.dtype), requires_grad=False
        )
        plain.bias = layer.bias
        model.set_submodule(name, plain)


def stack_adapters(layer: LoRALinear, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """All adapters of a layer as one of that scale: A (rank, in), B (out, rank), for B₁A₁ + B₂A₂ =
    [B₁ B₂ 0] [A₁; A₂; 0]."""
    A = torch.cat([distributed.whole(adapter.A) for adapter in layer.adapters.values()])
    B = torch.cat(
        [
            adapter.scale / scale * distributed.whole(adapter.B)
            for adapter in layer.adapters.values()
        ],
        dim=1,
    )
    spare = rank - len(A)  # where an adapter is not on every layer
    return F.pad(A, (0, 0, 0, spare)), F.pad(B, (0, spare))


def save_adapter(model, folder: str | Path) -> None:
    """Write all adapters, stacked into one, as PEFT's adapter_model.safetensors and
    adapter_config.json (vLLM reads them too).

    Every rank must call this, for adapters may be sharded; the first writes."""
    layers, tensors = lora_layers(model), {}
    rank = max(
        sum(len(adapter.A) for adapter in layer.adapters.values()) for layer in layers.values()
    )
    scales = {adapter.scale for layer in layers.values() for adapter in layer.adapters.values()}
    # a scale that all share is said by alpha, others go into B
    scale = scales.pop() if len(scales) == 1 else 1.0
    for name, layer in layers.items():
        A, B = stack_adapters(layer, rank, scale)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.detach().cpu().contiguous()
    if distributed.rank():
        return
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "inference_mode": True,
        **PLAIN,
    }
    write_bytes(Path(folder) / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_json(Path(folder) / CONFIG, config)


def digest(folder: Path) -> str:
    """Of an adapter's weights, to tell one from another; "" where none lies there."""
    path = folder / WEIGHTS
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _read(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """An adapter's configuration and tensors; DescError where it is broken or anything but plain
    LoRA."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise DescError(f"{folder}: holds no readable LoRA adapter ({error})") from None
    if (kind := config.get("peft_type") if isinstance(config, dict) else "no object") != "LORA":
        raise DescError(f"{folder}: {CONFIG} describes no LoRA adapter ({kind})")
    kinds = {"r": int, "lora_alpha": (int, float), "target_modules": (list, str)}
    if wrong := [key for key, kind in kinds.items() if not isinstance(config.get(key), kind)]:
        raise DescError(f"{folder}: {CONFIG} has no valid {', '.join(map(repr, wrong))}")
    if config.get("init_lora_weights", True) not in (
        True,
        False,
        "gaussian",
        "orthogonal",
        "eva",
        None,
    ):
        raise DescError(
            f"{folder}: init_lora_weights is {config['init_lora_weights']!r}, which changes the"
            " base's weights too"
        )
    if odd := [
        key
        for key, plain in (PLAIN | BEYOND).items()
        if (config.get(key) or plain or None) != (plain or None)
    ]:
        raise DescError(
            f"{folder}: uses {', '.join(odd)}, which desc's plain LoRA does not compute"
        )
    return config, tensors


def load_adapter(model, folder: str | Path, name: str, trainable: bool = False) -> None:
    """Attach an adapter saved by `save_adapter` or by PEFT. Frozen adapters have no dropout.

    Raises DescError where a file is missing or broken, uses a feature beyond plain LoRA, or does
    not fit the model: an adapter that loads but is not applied is the worst of bugs
    (vllm#34186)."""
    folder = Path(folder)
    config, tensors = _read(folder)
    modules, halves = dict(model.named_modules()), {}
    for key, tensor in tensors.items():
        module_name, _, half = key.removeprefix(PREFIX).rpartition(".lora_")
        if half not in ("A.weight", "B.weight") or not isinstance(
            modules.get(module_name), nn.Linear
        ):
            raise DescError(
                f"{folder}: {key} fits no linear layer of this model; is it an adapter for another"
                " one?"
            )
        halves.setdefault(module_name, {})[half[0]] = tensor
    for module_name, half in halves.items():
        layer = modules[module_name]
        shapes = {"A": (config["r"], layer.in_features), "B": (layer.out_features, config["r"])}
        if {key: tuple(tensor.shape) for key, tensor in half.items()} != shapes:
            raise DescError(
                f"{folder}: {module_name} has other shapes than this model's {shapes}; is it for"
                " another model?"
            )
    # PEFT's rule: a string is a regular expression for the whole name, a list holds ends of names
    targets = config["target_modules"]
    rule = targets if isinstance(targets, str) else rf"(.*\.)?({'|'.join(map(re.escape, targets))})"
    wanted = {n for n, m in modules.items() if isinstance(m, nn.Linear) and re.fullmatch(rule, n)}
    # PEFT was told to leave layers out
    some = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    if missing := ["any layer"] if not halves else [] if some else wanted - halves.keys():
        raise DescError(f"{folder}: has no weights for {', '.join(sorted(missing))}")
    if not lora_layers(model):
        model.requires_grad_(False)
    dropout = config.get("lora_dropout", 0.0) if trainable else 0.0
    for module_name, half in halves.items():
        adapter = _attach(model, module_name, name, config["r"], config["lora_alpha"], dropout)
        with torch.no_grad():
            adapter.A.copy_(half["A"])
            adapter.B.copy_(half["B"])
        adapter.requires_grad_(trainable)
