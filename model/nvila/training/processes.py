"""What the processes of a training run tell each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def rank() -> int:
    """Return the number of this process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def total(values: Sequence[float]) -> list[float]:
    """Add numbers up over all processes."""
    if world_size() == 1:
        return list(values)
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    summed = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(summed)
    return [float(value) for value in summed.tolist()]


def gathered(value: T) -> list[T]:
    """Return the value of every process, on all of them."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return [one for one in values if one is not None]


def from_first(value: T) -> T:
    """Return the first process's value on all of them."""
    if world_size() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Wait for all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
