"""Tuning in several processes: each holds the whole model and a share of every batch; gradients are averaged.

DeepSpeed, which training uses, wants all weights in one floating-point type. A base in bf16 or 4 bits under matrices in
fp32 is none of that, and what learns is small, so a plain average does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nvila.training.config import TrainConfig
from nvila.training.engine import ParameterGroup, TorchEngine, TrainEngine, build_engine
from nvila.training.optimizers import build_optimizer
from nvila.training.processes import world_size

# Numbers that go over the network at a time; a copy of so many is all the memory that it takes.
_BUCKET = 2**24


def build_tune_engine(model: nn.Module, groups: list[ParameterGroup], config: TrainConfig) -> TrainEngine:
    """Build the engine of a tuning run, in as many processes as there are.

    Args:
        model: The prepared model, the same in all of them.
        groups: What learns.
        config: The run.
    """
    if world_size() == 1:
        return build_engine(model, groups, config)
    join_processes(next(model.parameters()).device.type)
    optimizer = build_optimizer(
        config.optimizer,
        [{"params": group.parameters, "lr": group.lr, "peak_lr": group.lr} for group in groups],
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    return _SharedEngine(model, optimizer, config)


def join_processes(device: str) -> None:
    """Let the processes that torchrun started know each other; a second call does nothing.

    Args:
        device: Type of the device that gradients are on.
    """
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")


class _SharedEngine(TorchEngine):
    """Takes the mean gradient of all processes, so that their weights stay the same."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        super().__init__(model, optimizer, config)
        self.layout = ("averaged", 0)

    def _share_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            torch.distributed.all_reduce(flat)
            flat /= world_size()
            for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(mean.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield gradients in groups of a bounded size; a larger one is alone."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and size + gradient.numel() > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket
