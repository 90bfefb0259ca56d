"""Ranks: the processes that torchrun started, and what they tell each other. With one process
nothing here changes anything."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

# A rank may wait long for one that writes longer replies, but within a step not so long. Should one
# die, torchrun ends the others.
PATIENCE = timedelta(days=1)
STEP = timedelta(minutes=30)
patient: list[dist.ProcessGroup] = []  # the group in which ranks wait long, on the CPU


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
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=STEP)
        patient.append(dist.new_group(backend="gloo", timeout=PATIENCE))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device


def has_joined() -> bool:
    """Whether torchrun started this process, alone or with others, and join_ranks was called."""
    return dist.is_initialized()


def leave_ranks() -> None:
    """End what join_ranks began."""
    if dist.is_initialized():
        patient.clear()
        dist.destroy_process_group()


def gather_objects(part) -> list:
    """What each rank has, in the order of ranks, on every rank."""
    parts = [part] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, part, patient[0])
    return parts


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of each rank's `values`, in place, on every rank. A rank waits at most STEP for the
    others."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def on_any_rank(flag: bool) -> bool:
    """Whether it is true on any rank. It is asked on the CPU, so that no GPU is waited for."""
    count = torch.tensor(int(flag))
    if world_size() > 1:
        dist.all_reduce(count, group=patient[0])
    return bool(count)


def wait_for_all() -> None:
    """Wait until every rank is here, on the CPU. It may take hours: one rank may have much longer
    replies to write than another."""
    on_any_rank(False)
