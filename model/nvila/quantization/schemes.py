"""The schemes as torchao makes them: a linear layer's weight becomes one of torchao's tensor types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nvila.errors import ConfigError
from nvila.quantization.config import Scheme

INT4: torch.dtype = getattr(torch, "int4")  # noqa: B009  # torch's stubs lack the sub-byte types

# Weights are worked on some rows at a time, so that temporaries stay far below a block of a large model. Every scheme
# has scales of single rows, so nothing depends on it.
CHUNK_ELEMENTS = 1 << 21


def quantize_linears(module: nn.Module, scheme: Scheme, group_size: int) -> tuple[str, ...]:
    """Quantize every linear layer of a module in place, rounding to nearest.

    Args:
        module: A block, a part, or a linear layer itself.
        scheme: How; `none` changes nothing.
        group_size: Input channels that share a 4-bit scale.

    Returns:
        Names of the layers that were changed.

    Raises:
        ConfigError: A layer's input width is no multiple of the group size (torchao would skip it in silence).
    """
    if scheme == "none":
        return ()
    names = linear_names(module)
    if scheme == "w4a16":
        check_groups(module, group_size)
    config = torchao_config(scheme, group_size)
    for name in names:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight = nn.Parameter(_quantized(layer.weight.detach(), config), requires_grad=False)
    return names


def quantized_rows(weight_OI: Tensor, scheme: Scheme, group_size: int) -> Iterator[Tensor]:
    """Yield a weight in pieces of rows, each as a quantized tensor that `F.linear` takes."""
    config = torchao_config(scheme, group_size)
    for rows in row_chunks(weight_OI):
        yield _torchao_tensor(rows, config)


def row_chunks(weight_OI: Tensor) -> tuple[Tensor, ...]:
    """Return views of a weight's rows, each of at most about `CHUNK_ELEMENTS`."""
    chunks: tuple[Tensor, ...] = weight_OI.split(max(1, CHUNK_ELEMENTS // weight_OI.shape[1]))
    return chunks


def inner_names(tensor: Tensor) -> list[str]:
    """Return the names of the plain tensors that one of torchao's consists of."""
    kind: Any = type(tensor)
    names: list[str] = kind.__tensor_flatten__(tensor)[0]
    return names


def rebuilt(like: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """Make a tensor of the type of `like`, which may be on the meta device, of plain tensors."""
    kind: Any = type(like)
    context = kind.__tensor_flatten__(like)[1]
    built: Tensor = kind.__tensor_unflatten__(parts, context, like.shape, like.stride())
    return built


def _quantized(weight_OI: Tensor, config: Any) -> Tensor:
    chunks = row_chunks(weight_OI)
    if len(chunks) == 1:
        return _torchao_tensor(weight_OI, config)
    pieces = [_torchao_tensor(rows, config) for rows in chunks]
    whole = _torchao_tensor(torch.empty_like(weight_OI, device="meta"), config)
    names = inner_names(whole)
    return rebuilt(whole, {name: torch.cat([getattr(piece, name) for piece in pieces]) for name in names})


def _torchao_tensor(weight_OI: Tensor, config: Any) -> Tensor:
    from torchao.quantization import quantize_

    outputs, inputs = weight_OI.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    holder = nn.Sequential(layer)
    quantize_(holder, config, filter_fn=lambda module, _: isinstance(module, nn.Linear))
    weight = layer.weight.detach()
    # torchao hangs a method of the layer on the layer: it would keep its weight until Python looks for cycles.
    del layer.weight
    return weight


def torchao_config(scheme: Scheme, group_size: int) -> Any:
    """Return what torchao calls a scheme.

    Raises:
        ConfigError: The scheme has no layers to change.
    """
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
    )
    from torchao.quantization.granularity import PerGroup

    if scheme == "w8a8":
        return Int8DynamicActivationInt8WeightConfig()
    if scheme == "int8":
        return Int8WeightOnlyConfig()
    if scheme == "fp8":
        return Float8WeightOnlyConfig()
    if scheme == "w4a16":
        return IntxWeightOnlyConfig(
            weight_dtype=INT4, granularity=PerGroup(group_size), mapping_type=MappingType.ASYMMETRIC
        )
    raise ConfigError(f"'{scheme}' quantizes nothing", "use w8a8, w4a16, int8 or fp8")


def rounded_to_4_bits(weight_OI: Tensor, group_size: int) -> Tensor:
    """Return a weight after a trip to the grid of `w4a16`, by torchao's own code."""
    from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType

    narrow = IntxUnpackedToInt8Tensor.from_hp(weight_OI, (1, group_size), INT4, mapping_type=MappingType.ASYMMETRIC)
    wide: Tensor = narrow.dequantize()
    return wide


def linear_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the linear layers below a module."""
    return tuple(name for name, child in module.named_modules() if isinstance(child, nn.Linear))


def check_groups(module: nn.Module, group_size: int) -> None:
    """Check that a group size divides the input of every linear layer.

    Raises:
        ConfigError: With the first that it does not divide.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and layer.in_features % group_size:
            raise ConfigError(
                f"quantize.group_size {group_size} does not divide the {layer.in_features} inputs of {name}",
                "use a power of two that divides every width of the part, such as 32",
            )


def is_quantized_layer(layer: nn.Module) -> bool:
    """Whether a layer's weight is one of torchao's tensors."""
    return hasattr(getattr(layer, "weight", None), "qdata")
