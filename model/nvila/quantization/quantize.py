"""Quantize a model in place with torchao's tensor types: W8A8 vision tower, 4-bit weights in the language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nvila.errors import ConfigError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.quantization.config import QuantizationConfig

INT4: torch.dtype = getattr(torch, "int4")  # noqa: B009  # torch's stubs lack the sub-byte types


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
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        IntxWeightOnlyConfig,
        MappingType,
        quantize_,
    )
    from torchao.quantization.granularity import PerGroup

    vision: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    if config.vision == "w8a8":
        tower = model.model.vision_tower.encoder.layers[: model.config.num_vision_blocks]
        vision = linear_names(tower)
        quantize_(tower, Int8DynamicActivationInt8WeightConfig(), filter_fn=_is_linear)
    if config.language == "w4a16":
        decoder = model.model.language_model
        language = linear_names(decoder)
        _check_groups(decoder, language, config.group_size)
        scheme = IntxWeightOnlyConfig(
            weight_dtype=INT4,
            granularity=PerGroup(config.group_size),
            mapping_type=MappingType.ASYMMETRIC,
        )
        quantize_(decoder, scheme, filter_fn=_is_linear)
    return QuantizedLayers(vision=vision, language=language)


def linear_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the linear layers below a module."""
    return tuple(name for name, child in module.named_modules() if isinstance(child, nn.Linear))


def _is_linear(module: nn.Module, _: str) -> bool:
    return isinstance(module, nn.Linear)


def _check_groups(decoder: nn.Module, names: tuple[str, ...], group_size: int) -> None:
    for name in names:
        layer = decoder.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        width = layer.in_features
        if width % group_size:
            raise ConfigError(
                f"quantize.group_size {group_size} does not divide the {width} inputs of {name}",
                "use a power of two that divides every width of the language model, such as 32",
            )
