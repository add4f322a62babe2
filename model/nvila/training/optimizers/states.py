"""Reading and setting an optimizer's state by tensor, in fp32 whatever form the optimizer keeps it in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nvila.training.optimizers.fp8_adamw import Fp8AdamW

MOMENTS = ("exp_avg", "exp_avg_sq")


def step_count(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    """Return how often a parameter was updated."""
    return int(optimizer.state[parameter]["step"]) if optimizer.state.get(parameter) else 0


def wide_moment(optimizer: torch.optim.Optimizer, parameter: Tensor, name: str) -> Tensor:
    """Return a moment of a parameter as a flat fp32 tensor."""
    if isinstance(optimizer, Fp8AdamW):
        return optimizer.moment(parameter, name).dequantize(parameter.numel())
    moment: Tensor = optimizer.state[parameter][name]
    return moment.view(-1)


def set_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, moments: Mapping[str, Tensor], steps: int) -> None:
    """Set the state of a parameter from fp32 moments of its shape."""
    if isinstance(optimizer, Fp8AdamW):
        optimizer.set_moments(parameter, moments, steps)
    else:
        step = torch.tensor(float(steps), device=parameter.device)
        optimizer.state[parameter] = {"step": step, **moments}


def exact_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return a parameter's state as it is, where its moments are not fp32 already."""
    if not isinstance(optimizer, Fp8AdamW):
        return {}
    return {name: value for name, value in optimizer.state.get(parameter, {}).items() if name != "step"}


def set_exact_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, state: Mapping[str, Tensor], steps: int
) -> None:
    """Set what `exact_state` returned."""
    on_device = {name: value.to(parameter.device) for name, value in state.items()}
    optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **on_device}
