"""What trades time against memory in training: fused layers, and activations computed again."""

import torch

from desc import DescError


def compile_layers(model, device: torch.device) -> None:
    """Let TorchInductor fuse the element-wise work of the decoder's layers, on a GPU.

    Rounding between fused operations stays as it is without, so that a policy still equals its
    reference to the bit. Raises DescError on a CPU, where it gained nothing (docs/results.md)."""
    if device.type == "cpu":
        raise DescError("--compile is for GPUs: on a CPU it gains nothing; leave it out")
    for layer in model.get_submodule("model.layers"):
        # Its forward alone: the hooks by which FSDP gathers weights stay outside.
        options = {"emulate_precision_casts": True}
        layer.forward = torch.compile(layer.forward, dynamic=True, options=options)


def recompute_activations(model) -> None:
    """Activation checkpointing: in training mode a layer keeps its input alone, and runs again in
    the backward pass."""
    # the second is the name that it had before Transformers 5.24
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
