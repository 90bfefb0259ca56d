"""LoRA by hand: adapters beside frozen linear layers, several at once, each switched off at will.

    y = W x + Σ_adapters (alpha / r) B A x

with A (r, in) random and B (out, r) zero at first (Hu et al. 2021, section 4.1), so that a fresh
adapter changes nothing, to the bit. On disk they are PEFT's (desc/storage/adapters.py)."""

import math
import re
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import regex  # Transformers brings it; unlike re it can give up a pattern that never ends
import torch
import torch.nn.functional as F
from torch import nn

from desc import DescError
from desc.forward import decoder_blocks
from desc.storage.adapters import PREFIX, read_adapter, write_adapter


class Adapter(nn.Module):
    """The factors of (alpha / r) B A for one linear layer: A (r, in) and B (out, r), in fp32."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        # A is drawn on the CPU, so that it starts alike on every device and rank, and even if the
        # layer's weight has no values yet (the meta device).
        A = nn.init.kaiming_uniform_(torch.empty(rank, linear.in_features), a=math.sqrt(5))
        device = torch.device("cpu") if linear.weight.is_meta else linear.weight.device
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)


class LoRALinear(nn.Linear):
    """A linear layer with adapters beside its frozen weight.

    It takes over the weight itself, so the model's state dict keeps its keys."""

    def __init__(self, linear: nn.Linear):
        bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.adapters = nn.ModuleDict()
        self.off: set[str] = set()  # names of adapters that are switched off
        self.ready: tuple[torch.Tensor, torch.Tensor] | None = None  # factors(), while they stay

    def used(self) -> dict[str, Adapter]:
        """A frozen adapter that is off is left out. A trainable one that is off stays in with its B
        set to zero: policy and reference then run the same kernels on the same shapes, so they
        agree to the bit where they should."""
        return {n: a for n, a in self.adapters.items() if n not in self.off or a.A.requires_grad}

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """[A₁; A₂] (r₁ + r₂, in) and [scale₁ B₁, scale₂ B₂] (out, r₁ + r₂) of the adapters that are
        used.

        Cast where they are used: the products run in the base model's dtype, while the optimizer
        sees fp32. And cast before they are scaled, because FSDP hands them over cast."""
        A, B = [], []
        for name, adapter in self.used().items():
            A.append(adapter.A.to(dtype))
            B.append(adapter.B.to(dtype) * (0.0 if name in self.off else adapter.scale))
        return torch.cat(A), torch.cat(B, dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) -> (…, out). All adapters together are two products:

            B₁ A₁ x + B₂ A₂ x = [B₁ B₂] [A₁; A₂] x

        whose factors are stacked by `factors`."""
        used = list(self.used().values())
        if not used:
            return super().forward(x)
        A, B = self.ready or self.factors(x.dtype)
        if any(adapter.dropout.p > 0 for adapter in used):  # each drops inputs of its own
            parts = zip(used, A.split([len(adapter.A) for adapter in used]))
            inner = torch.cat([F.linear(adapter.dropout(x), a) for adapter, a in parts], dim=-1)
        else:
            inner = F.linear(x, A)  # (…, r₁ + r₂)
        y = F.linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        # Added where it lies, because a second tensor (…, out) would cost time.
        y.addmm_(inner.reshape(len(y), B.shape[1]), B.T)
        return y.view(*x.shape[:-1], self.out_features)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that carry adapters, by module name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers, with adapters or without, by module name. A subclass that computes
    something else, such as Llama 4's router, is none."""
    plain = (nn.Linear.forward, LoRALinear.forward)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward in plain
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
    model,
    name: str,
    rank: int = 16,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Sequence[str] = (),
) -> None:
    """Freeze the model and put a fresh, trainable adapter on linear layers of its decoder: on those
    whose last name is in `targets`, or on all if that is empty. The head is no part of the decoder.
    A module that is no model of Transformers counts as a decoder.

    Raises DescError if a target names no layer, or if there is none at all."""
    decoder = decoder_blocks(model) if hasattr(model, "config") else model
    inside = set(decoder.modules())
    linears = [name for name, module in linear_layers(model).items() if module in inside]
    last_names = {module_name.rpartition(".")[2] for module_name in linears}
    missing = set(targets) - last_names
    if not linears:
        raise DescError(
            "this model's decoder has no linear layer (nn.Linear) that LoRA could adapt"
        )
    if missing:
        raise DescError(
            f"no linear layer of the decoder is called {', '.join(sorted(missing))}; this model has"
            f" {', '.join(sorted(last_names))}"
        )
    model.requires_grad_(False)
    for module_name in linears:
        if not targets or module_name.rpartition(".")[2] in targets:
            _attach(model, module_name, name, rank, alpha, dropout)


def train_adapters(model) -> None:
    """Put the adapters in training mode, in which they drop inputs, and the base in eval mode. Its
    own dropout would keep a policy from equalling its reference."""
    model.eval()
    for layer in lora_layers(model).values():
        layer.adapters.train()


@contextmanager
def adapter_off(model, *names: str):
    """Within this context the model answers as if the adapters `names` were not there. They are on
    again afterwards, even after an exception."""
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
    attached = {name for layer in lora_layers(model).values() for name in layer.adapters}
    return adapter_off(model, *attached - set(names))


@contextmanager
def ready_adapters(model):
    """Within this context adapters are cast, scaled and stacked once, instead of in every pass. It
    is for many passes over few tokens, without gradients, in which no adapter is switched."""
    layers = [layer for layer in lora_layers(model).values() if layer.used()]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.ready = layer.factors(layer.weight.dtype)
        yield
    finally:
        for layer in layers:
            layer.ready = None


def merge_adapters(model) -> None:
    """Add all adapters to the weights, in fp32 and rounded once, and leave plain linear layers."""
    for name, layer in lora_layers(model).items():
        delta = sum(a.scale * (a.B @ a.A) for a in layer.adapters.values())
        merged = (layer.weight.float() + delta).detach().to(layer.weight.dtype)
        bias = layer.bias is not None
        plain = nn.Linear(layer.in_features, layer.out_features, bias, device="meta")
        plain.weight, plain.bias = nn.Parameter(merged, requires_grad=False), layer.bias
        model.set_submodule(name, plain)


def stack_adapters(
    layer: LoRALinear, rank: int, scale: float, gather=lambda tensor: tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """All adapters of a layer as one of that rank and scale: A (rank, in), B (out, rank).

    B₁ A₁ + B₂ A₂ = [B₁ B₂ 0] [A₁; A₂; 0], exactly. The zeros fill up a layer on which an adapter
    is missing. `gather` makes a sharded tensor whole."""
    A = torch.cat([gather(adapter.A) for adapter in layer.adapters.values()])
    B = [adapter.scale / scale * gather(adapter.B) for adapter in layer.adapters.values()]
    missing = rank - len(A)
    return F.pad(A, (0, 0, 0, missing)), F.pad(torch.cat(B, dim=1), (0, missing))


@torch.no_grad()
def export_adapters(model, gather=lambda tensor: tensor) -> tuple[dict, dict[str, torch.Tensor]]:
    """All adapters stacked into one, on the CPU: (PEFT's settings, its halves by name), as
    write_adapter takes them. `gather` makes a sharded tensor whole."""
    layers, halves = lora_layers(model), {}
    adapters = [list(layer.adapters.values()) for layer in layers.values()]
    rank = max(sum(len(adapter.A) for adapter in those) for those in adapters)
    scales = {adapter.scale for those in adapters for adapter in those}
    # A scale that all share is said by alpha; different ones are multiplied into B.
    scale = scales.pop() if len(scales) == 1 else 1.0
    for name, layer in layers.items():
        A, B = stack_adapters(layer, rank, scale, gather)
        halves |= {f"{name}.lora_A": A.cpu(), f"{name}.lora_B": B.cpu()}
    settings = {
        "base_model_name_or_path": model.name_or_path,
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": target_modules(model, list(layers)),
    }
    return settings, halves


def target_modules(model, names: list[str]) -> list[str]:
    """What PEFT calls the layers `names`: their last names, or if other linear layers have such a
    name, too, their whole names."""
    last_names = sorted({name.rpartition(".")[2] for name in names})
    same = targeted(linear_layers(model), last_names) == set(names)
    return last_names if same else sorted(names)


def save_adapter(model, folder: str | Path) -> None:
    """Write all adapters, stacked into one, as PEFT's adapter_model.safetensors and
    adapter_config.json. PEFT and vLLM load them on the untouched base model."""
    write_adapter(Path(folder), *export_adapters(model))


def load_adapter(model, folder: str | Path, name: str, trainable: bool = False) -> None:
    """Attach an adapter that `save_adapter` or PEFT has written. A frozen one has no dropout.

    Raises DescError if a file is missing or broken, if the adapter is not plain LoRA, or if it does
    not fit the model: an adapter that loads but is not applied is the worst of bugs
    (vllm#34186)."""
    folder = Path(folder)
    settings, tensors = read_adapter(folder)
    linears = linear_layers(model)
    halves = match_halves(folder, tensors, linears, settings["r"])
    # PEFT may have been told to leave layers out; then it cannot be known which are missing.
    partial = settings.get("layers_to_transform") is not None or settings.get("exclude_modules")
    try:
        missing = set() if partial else targeted(linears, settings["target_modules"])
    except DescError as error:
        raise DescError(f"{folder}: {error}") from None
    missing -= halves.keys()
    if missing or not halves:
        raise DescError(f"{folder}: has no weights for {', '.join(sorted(missing)) or 'any layer'}")
    if not lora_layers(model):
        model.requires_grad_(False)
    dropout = settings.get("lora_dropout", 0.0) if trainable else 0.0
    for module_name, half in halves.items():
        adapter = _attach(model, module_name, name, settings["r"], settings["lora_alpha"], dropout)
        with torch.no_grad():
            adapter.A.copy_(half["A"])
            adapter.B.copy_(half["B"])
        adapter.requires_grad_(trainable)


def match_halves(
    folder: Path, tensors: dict[str, torch.Tensor], linears: dict[str, nn.Linear], rank: int
) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of an adapter by linear layer: {module name: {"A": (r, in), "B": (out, r)}}.

    Raises DescError for a tensor that fits no layer of this model."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module_name, _, half = key.removeprefix(PREFIX).rpartition(".lora_")
        if half not in ("A.weight", "B.weight") or module_name not in linears:
            raise DescError(
                f"{folder}: {key} fits no linear layer of this model; is it an adapter for another"
                " one?"
            )
        halves.setdefault(module_name, {})[half[0]] = tensor
    for module_name, half in halves.items():
        layer = linears[module_name]
        shapes = {"A": (rank, layer.in_features), "B": (layer.out_features, rank)}
        if {name: tuple(tensor.shape) for name, tensor in half.items()} != shapes:
            raise DescError(
                f"{folder}: {module_name} has other shapes than this model's {shapes}; is it for"
                " another model?"
            )
    return halves


def targeted(linears: dict[str, nn.Linear], targets: list[str] | str) -> set[str]:
    """The layers that PEFT's target_modules mean. A string is a regular expression for a module's
    whole name; a list holds ends of names."""
    ends = targets if isinstance(targets, list) else []
    if targets == "all-linear":  # PEFT's word
        return set(linears)
    rule = rf"(.*\.)?({'|'.join(map(re.escape, ends))})" if ends else targets
    try:
        found = {name for name in linears if rule and regex.fullmatch(rule, name, timeout=1)}
    except TimeoutError:
        raise DescError(f"target_modules {rule[:60]!r} takes too long to match") from None
    except (regex.error, OverflowError, RecursionError) as error:
        raise DescError(
            f"target_modules {rule[:60]!r} is no regular expression ({error})"
        ) from None
    if rule and not found:
        raise DescError(f"target_modules {rule[:60]!r} matches no linear layer of this model")
    return found
