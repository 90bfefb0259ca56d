"""The base model on several ranks: a copy on each, whose adapters' gradients are averaged, or with
FSDP2 a part of every weight on each, which reads that part alone from the model's files.

FSDP2 gathers every weight for the reference, for the policy and for the backward pass. So a model
that fits is copied."""

import math
import os

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from desc import DescError
from desc.forward import decoder_blocks
from desc.storage.base import locate, read_header, weight_files
from desc.training.ranks import on_any_rank, rank, world_size


def must_shard(config, device: torch.device) -> bool:
    """Whether the ranks share one copy of the base model, as --shard says. `auto` shards a model
    whose weights would take more than half of a rank's memory.

    Raises DescError if there is one process that torchrun did not start."""
    if config.shard == "always" and not dist.is_initialized():
        raise DescError("--shard always is for torchrun: torchrun --nproc_per_node 1 SCRIPT …")
    if config.shard != "auto":
        return config.shard == "always"
    too_large = world_size() > 1 and weight_bytes(config) > memory_of_rank(device) / 2
    return on_any_rank(too_large)


def weight_bytes(config) -> int:
    """Bytes of a base model's weights in the dtype in which it is loaded."""
    headers = [read_header(path)[1] for path in weight_files(locate(config.model))]
    entries = [entry for header in headers for entry in header.values()]
    return sum(math.prod(entry["shape"]) for entry in entries) * config.torch_dtype.itemsize


def memory_of_rank(device: torch.device) -> float:
    """Bytes of memory that each rank of this machine may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Give each rank the mean of all ranks' gradients, by one sum (160 MB for rank 16 on all layers
    of a 7B model). FSDP has done so for its own already. A layer that was not used has none."""
    parameters = [p for p in parameters if p.grad is not None]  # the same on every rank
    if world_size() == 1 or not parameters or isinstance(parameters[0], DTensor):
        return
    gradients = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(gradients)
    gradients /= world_size()
    for p, gradient in zip(parameters, gradients.split([p.numel() for p in parameters])):
        p.grad.copy_(gradient.view_as(p))


def shard(model, device: torch.device) -> None:
    """Split every weight over the ranks: each decoder layer is a unit, and what lies outside them,
    such as embeddings and head, which may be tied, is one together.

    Weights are gathered and used in the base model's dtype, and gradients averaged in fp32. What
    the optimizer holds of the adapters stays fp32."""
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32)
    for unit in (*decoder_blocks(model), outer_modules(model), model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)


def outer_modules(model) -> list[nn.Module]:
    """The modules beside the decoder's layers that hold weights of their own: embeddings, norms,
    the head."""
    blocks = decoder_blocks(model)
    inner = set(blocks.modules())
    around = {module for module in model.modules() if blocks in module.modules()}
    beside = [module for module in model.modules() if module not in inner | around]
    return [module for module in beside if list(module.parameters(recurse=False))]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded, gathered. Every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: DTensor) -> slice:
    """Which rows of the whole weight this rank holds."""
    each = -(-tensor.shape[0] // world_size())
    begin = min(rank() * each, tensor.shape[0])
    return slice(begin, begin + tensor.to_local().shape[0])


@torch.no_grad()
def copy_whole(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole value, the same on every rank, into a tensor that may be sharded."""
    if isinstance(tensor, DTensor):
        tensor.to_local().copy_(value[local_rows(tensor)])
    else:
        tensor.copy_(value)


def read_weights(model) -> None:
    """Give a sharded, empty model its values: each rank reads its own rows of each weight, and the
    whole of each buffer that is saved with a model, from the model's safetensors files.

    Raises DescError if one is not in them, or has another shape there."""
    folder = locate(model.name_or_path)
    empty = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta}
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    shapes = {name: list(tensor.shape) for name, tensor in (empty | buffers).items()}
    values, read = {}, set()
    for path in weight_files(folder):
        read_header(path)  # refuses a file that is cut off
        with safe_open(path, "pt") as file:
            for name in shapes.keys() & file.keys():
                here, there = shapes[name], file.get_slice(name).get_shape()
                if there != here:
                    raise DescError(f"{path} holds {name} of shape {there}, not {here}")
            for name in empty.keys() & file.keys():
                values[id(empty[name])] = read_parameter(file, name, empty[name])
            for name in buffers.keys() & file.keys():
                buffers[name].copy_(file.get_tensor(name))
                read.add(name)
    # a tied weight has two names, of which the files may hold one
    state = {name: values[id(p)] for name, p in empty.items() if id(p) in values}
    model.load_state_dict(state, strict=False, assign=True)
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    missing += sorted(buffers.keys() - read)
    if missing:
        raise DescError(
            f"{folder}: its safetensors files have no {', '.join(missing[:3])} …; try --shard"
            " never, which can convert older names, and if that fails, too, fetch the model again"
        )


def read_parameter(file, name: str, empty: DTensor) -> nn.Parameter:
    """This rank's rows of a weight in an open safetensors file, as a part of the sharded whole."""
    rows = file.get_slice(name)[local_rows(empty)]
    rows = rows.to(empty.dtype).to(empty.device_mesh.device_type)
    layout = {"shape": empty.shape, "stride": empty.stride(), "run_check": False}
    value = DTensor.from_local(rows, empty.device_mesh, empty.placements, **layout)
    return nn.Parameter(value, requires_grad=False)
