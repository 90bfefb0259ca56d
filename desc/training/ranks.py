"""Ranks: the processes that torchrun started, and what they tell each other. With one process
nothing here changes anything."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def join_ranks() -> torch.device:
    """Join the processes that torchrun started; all but the first are silenced. Returns this
    process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # A rank may wait long for one that writes longer replies. Should one die, torchrun ends the
        # others.
        dist.init_process_group(backend, timeout=timedelta(days=1))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device


def leave_ranks() -> None:
    """End what join_ranks began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather_objects(part) -> list:
    """What each rank has, in the order of ranks, on every rank."""
    parts = [part] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, part)
    return parts


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of each rank's `values`, in place, on every rank."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def on_any_rank(flag: bool) -> bool:
    """Whether it is true on any rank. It is asked on the CPU, so that no GPU is waited for."""
    return bool(sum_over_ranks(torch.tensor(int(flag))))


def wait_for_all() -> None:
    """Wait until every rank is here, on the CPU. It may take hours: one rank may have much longer
    replies to write than another."""
    on_any_rank(False)
