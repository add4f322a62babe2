"""Two backends of one training step: DeepSpeed, and plain torch for a single process.

Both take the same AdamW over the same parameter groups; in fp32 they give the same losses.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nvila.errors import CapabilityError
from nvila.training.config import TrainConfig
from nvila.training.optimizers import build_optimizer
from nvila.training.partitions import Partitions, whole_parameters
from nvila.training.precision import InPrecision


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What became of an optimizer step, the same on every process.

    Args:
        grad_norm: Global norm of the gradient before clipping.
        applied: False when the gradient was not finite and the weights stayed as they were.
    """

    grad_norm: float
    applied: bool


class TrainEngine(Protocol):
    """Runs forward, backward and the optimizer on a model."""

    module: nn.Module
    layout: tuple[str, int]
    """Backend and ZeRO stage: with the number of processes they decide who holds what."""

    def __call__(self, **inputs: Any) -> Any:
        """Run the model in the precision of the configuration, on inputs from any device."""

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate gradients; `last` marks the last micro-batch of a step, on every process the same one."""

    def step(self, lr_scale: float) -> StepOutcome:
        """Clip, update with every group's peak rate times `lr_scale`, and clear the gradients.

        A gradient that is not finite on any process changes nothing on all of them.
        """

    def partitions(self) -> Partitions:
        """Return access to weights and optimizer state, whatever part of them this process holds."""

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Return all weights by name on the first process, nothing on others; None where the module holds them.

        Every process must call it.
        """

    def close(self) -> None:
        """Free what the backend holds; the model stays usable, except that ZeRO 3 leaves it in parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Parameters of one part of the model and their peak learning rate."""

    name: str
    parameters: list[nn.Parameter]
    lr: float


def build_engine(model: nn.Module, groups: list[ParameterGroup], config: TrainConfig) -> TrainEngine:
    """Build the backend that the configuration names; torch trains where the model is, DeepSpeed on its own device."""
    optimizer = build_optimizer(
        config.optimizer,
        [{"params": group.parameters, "lr": group.lr, "peak_lr": group.lr} for group in groups],
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    if config.backend == "torch":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise CapabilityError("train.backend=torch runs one process only", "use train.backend=deepspeed")
        return TorchEngine(model, optimizer, config)
    from nvila.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, optimizer, config)


def scale_rates(groups: list[dict[str, Any]], lr_scale: float) -> None:
    """Set the learning rate of every optimizer group to its peak times `lr_scale`."""
    for group in groups:
        group["lr"] = group["peak_lr"] * lr_scale


def on_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the inputs of a model with their tensors on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


class TorchEngine:
    """Plain torch, in one process.

    Args:
        model: The model.
        optimizer: Over its trained parameters.
        config: Precision, and where gradients are clipped.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        self.module = model
        self.layout = ("torch", 0)
        self._optimizer = optimizer
        self._max_grad_norm = config.max_grad_norm
        self._precision = InPrecision(model, config.precision)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._device = self._parameters[0].device

    def __call__(self, **inputs: Any) -> Any:
        """Run the model on its own device."""
        return self.module(**on_device(inputs, self._device))

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate gradients."""
        loss.backward()

    def step(self, lr_scale: float) -> StepOutcome:
        """Update, unless the norm of the gradient is not finite."""
        for parameter in self._parameters:
            # As DeepSpeed does for parts that no sample of a step went through: AdamW would leave them alone, and how
            # samples are dealt to processes would decide about their moments and decay.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._share_gradients()
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm))
        applied = math.isfinite(norm)
        if applied:
            scale_rates(self._optimizer.param_groups, lr_scale)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepOutcome(grad_norm=norm, applied=applied)

    def partitions(self) -> Partitions:
        """Return access to weights and optimizer state."""
        return whole_parameters(self.module, self._optimizer)

    def whole_weights(self) -> None:
        """Return nothing: the module holds them."""
        return None

    def close(self) -> None:
        """Drop what gradients are left, and the precision's hooks."""
        self._precision.remove()
        self._optimizer.zero_grad(set_to_none=True)

    def _share_gradients(self) -> None:
        """Nothing to do: there are no other processes."""
