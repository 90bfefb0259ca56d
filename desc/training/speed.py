"""What trades time against memory in training: fused layers, and activations computed again."""

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from desc import DescError
from desc.attention import compile_for_all_lengths
from desc.forward import decoder_blocks


def compile_layers(model, device: torch.device) -> None:
    """Let TorchInductor fuse the element-wise work of the decoder's layers, on a GPU.

    Rounding between fused operations stays as it is without, so that in bf16 a policy still equals
    its reference to the bit (seen with PyTorch 2.11). In fp32, and in bf16 before 2.11 (its pull
    request 176848), the layer's product and the adapters' may be added by another kernel if there
    are no gradients; they then differ by rounding. Raises DescError on a CPU, where it gained
    nothing (docs/speed.md)."""
    if device.type == "cpu":
        raise DescError("--compile is for GPUs: on a CPU it gains nothing; leave it out")
    for layer in decoder_blocks(model):
        # Its forward alone: the hooks by which FSDP gathers weights stay outside.
        options = {"emulate_precision_casts": True}
        layer.forward = compile_for_all_lengths(layer.forward, options=options)


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
