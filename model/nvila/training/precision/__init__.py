"""Precision of the language model's matrix products: fp32, bf16, or fp8."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from nvila.training.config import PrecisionConfig
from nvila.training.precision.fp8_emulated import convert_linears


def apply_precision(language_model: nn.Module, config: PrecisionConfig) -> int:
    """Prepare a language model for training in a precision, in place.

    Returns:
        How many linear layers were converted to FP8.
    """
    if config.name != "fp8":
        return 0
    return convert_linears(language_model, min_features=config.fp8_min_features)


def autocast(config: PrecisionConfig, device_type: str) -> AbstractContextManager[object]:
    """Return the autocast context of a forward pass."""
    if config.name == "bf16":
        return torch.autocast(device_type, dtype=torch.bfloat16)
    return nullcontext()


__all__ = ["apply_precision", "autocast"]
