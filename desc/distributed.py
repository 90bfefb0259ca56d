"""Ranks: everything that depends on how many processes run is here. With one process, nothing here
changes anything.

torchrun starts the processes. For training the model is sharded over them by FSDP2: each holds a
part of every weight, and each reads its part of a batch. For mining and evaluation each process
holds the whole model and takes every n-th dialogue."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from desc.encoding import Item
from desc.tree import Forest, deal, pack


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def setup() -> torch.device:
    """This process's device. Joins the processes that torchrun started; all but the first are
    silenced."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if size() > 1 and not dist.is_initialized():
        # A rank may wait long for one that writes longer replies; should one die, torchrun ends the
        # others.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1)
        )
    if rank():
        sys.stdout = open(os.devnull, "w")
    return device


def shard(model, device: torch.device) -> None:
    """Split every weight over the ranks (FSDP2): one unit a decoder layer, one of embeddings, last
    norm and head, which may be tied.

    Gathered and used in the base model's dtype, gradients averaged in fp32; what the optimizer
    holds of the adapters stays fp32."""
    mesh, decoder = init_device_mesh(device.type, (size(),)), model.model
    policy = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32)
    for unit in (*decoder.layers, [decoder.embed_tokens, decoder.norm, model.lm_head], model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)


def sharded(model) -> bool:
    return isinstance(model, FSDPModule)


def portion(
    model, items: list[Item], share: str, max_tokens: int
) -> list[tuple[list[Item], Forest]]:
    """This rank's micro-batches of some items (tree.pack), on its device: all of them, unless the
    model is sharded."""
    batches = pack(items, share, max_tokens, size() if sharded(model) else 1)
    mine = deal(batches, size())[rank()] if sharded(model) else batches
    return [(members, forest.to(model.device)) for members, forest in mine]


def collect(part: list) -> list[list]:
    """What each rank has, in the order of ranks, on every rank."""
    parts = [part] * size()
    if size() > 1:
        dist.all_gather_object(parts, part)
    return parts


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum over ranks."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def anyone(flag: bool) -> bool:
    """Whether it is true on any rank. On the CPU, so the device need not be waited for."""
    return bool(total(torch.tensor(int(flag))))


def barrier() -> None:
    """Wait until every rank is here. On the CPU: mining may take one rank hours longer than
    another."""
    anyone(False)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def place(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole value, the same on every rank, into a tensor that may be sharded."""
    if isinstance(tensor, DTensor):
        tensor.to_local().copy_(value[rows(tensor)])
    else:
        tensor.copy_(value)


def rows(tensor: DTensor) -> slice:
    """Which rows of the whole this rank's part of a sharded weight is."""
    each = -(-tensor.shape[0] // size())
    begin = min(rank() * each, tensor.shape[0])
    return slice(begin, begin + tensor.to_local().shape[0])
