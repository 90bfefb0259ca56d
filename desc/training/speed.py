"""What trades time against memory in training: fused layers, and activations computed again."""

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from desc import DescError
from desc.forward import decoder_blocks


def compile_layers(model, device: torch.device) -> None:
    """Let TorchInductor fuse the element-wise work of the decoder's layers, on a GPU.

    Rounding between fused operations stays as it is without, so that a policy still equals its
    reference to the bit. Raises DescError on a CPU, where it gained nothing (docs/results.md)."""
    if device.type == "cpu":
        raise DescError("--compile is for GPUs: on a CPU it gains nothing; leave it out")
    for layer in decoder_blocks(model):
        # Its forward alone: the hooks by which FSDP gathers weights stay outside.
        options = {"emulate_precision_casts": True}
        layer.forward = torch.compile(layer.forward, dynamic=True, options=options)


def recompute_activations(model) -> None:
    """Activation checkpointing: if there are gradients, a layer keeps its input alone, and runs
    again in the backward pass."""
    for layer in decoder_blocks(model):
        layer.forward = partial(recomputed, layer.forward)


def recomputed(forward: Callable, *args, **kwargs):
    """forward(…), without keeping what it computes in between."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
