"""Quantize a model in place by rounding to nearest, with torchao's tensor types; calibration is in `calibrated.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from nvila.configuration import NVILAConfig
from nvila.modeling import NVILAForConditionalGeneration
from nvila.quantization.config import Part, QuantizationConfig
from nvila.quantization.schemes import INT4, check_groups, linear_names, quantize_linears


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLayers:
    """Names of the linear layers that a call changed, by part."""

    vision: tuple[str, ...]
    language: tuple[str, ...]


def quantize_model(model: NVILAForConditionalGeneration, config: QuantizationConfig) -> QuantizedLayers:
    """Quantize the linear layers of both towers in place.

    Returns:
        The layers that were changed.

    Raises:
        ConfigError: A layer's input width is no multiple of the group size (torchao would skip it in silence).
    """
    check_widths(model, config)
    return QuantizedLayers(
        vision=quantize_linears(part_module(model, "vision"), config.vision, config.group_size),
        language=quantize_linears(part_module(model, "language"), config.language, config.group_size),
    )


def part_module(model: NVILAForConditionalGeneration, part: Part) -> nn.Module:
    """Return the layers of a part that are quantized: the tower's blocks that run, or the decoder."""
    if part == "language":
        return cast("nn.Module", model.model.language_model)
    config = cast("NVILAConfig", model.config)
    return cast("nn.Module", model.model.vision_tower.encoder.layers[: config.num_vision_blocks])


def part_prefix(part: Part) -> str:
    """Return what the names of a part's layers start with in the whole model."""
    return "model.language_model." if part == "language" else "model.vision_tower.encoder.layers."


def check_widths(model: NVILAForConditionalGeneration, config: QuantizationConfig) -> None:
    """Check that the group size fits, before any work is done.

    Raises:
        ConfigError: It does not divide a layer's inputs.
    """
    for part in ("vision", "language"):
        if config.scheme(part) == "w4a16":
            check_groups(part_module(model, part), config.group_size)


__all__ = [
    "INT4",
    "QuantizedLayers",
    "check_widths",
    "linear_names",
    "part_module",
    "part_prefix",
    "quantize_model",
]
