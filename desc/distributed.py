"""Ranks: everything that depends on how many processes run is here."""

import os

import torch

from desc import DescError


def setup() -> torch.device:
    """This process's device. Raises DescError when torchrun starts more than one process."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise DescError("several processes are not supported yet: launch with plain python or torchrun --nproc_per_node 1")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
