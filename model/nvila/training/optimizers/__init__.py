"""Optimizers: torch's AdamW, and AdamW with FP8 moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nvila.training.config import OptimizerName
from nvila.training.optimizers.fp8_adamw import Fp8AdamW


def build_optimizer(
    name: OptimizerName, groups: Sequence[dict[str, Any]], *, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Build the optimizer of a configuration over parameter groups."""
    if name == "fp8_adamw":
        return Fp8AdamW(groups, betas=betas, weight_decay=weight_decay)
    return torch.optim.AdamW(list(groups), betas=betas, weight_decay=weight_decay, fused=True)


__all__ = ["Fp8AdamW", "build_optimizer"]
