"""The language part of a quantized model by plain tensors, for exports into the forms of other engines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from nvila.modeling import NVILAForConditionalGeneration
from nvila.quantization.config import Scheme
from nvila.quantization.schemes import INT4


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearWeight:
    """A quantized linear layer's weight: value = scale * (whole - zero point), by row and group.

    Args:
        name: Layer below the decoder, such as `layers.0.mlp.up_proj`.
        scheme: Its scheme.
        whole: (O, I) int8, or float8 for `fp8`.
        scale: (O, G) with G groups of inputs; one for schemes of whole rows.
        zero_point: (O, G) int8.
    """

    name: str
    scheme: Scheme
    whole: Tensor
    scale: Tensor
    zero_point: Tensor

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.whole.shape[1] // self.scale.shape[1]


def weights_of(model: NVILAForConditionalGeneration) -> Iterator[tuple[str, Tensor | LinearWeight]]:
    """Yield every weight of the decoder and its head under the names of a causal language model of its family.

    The head is left out where it is the embedding.
    """
    decoder = cast("nn.Module", model.model.language_model)
    for name, parameter in decoder.named_parameters():
        layer = name.removesuffix(".weight")
        quantized = _linear_weight(layer, parameter.detach())
        yield f"model.{name}", quantized or parameter.detach()
    if not model.config.tie_word_embeddings:
        yield "lm_head.weight", model.lm_head.weight.detach()


def scheme_of(model: NVILAForConditionalGeneration) -> tuple[Scheme, int]:
    """Return the scheme of the decoder's linear layers and its group size; `none` and 0 of a wide one."""
    for _, weight in weights_of(model):
        if isinstance(weight, LinearWeight):
            return weight.scheme, weight.group_size
    return "none", 0


def _linear_weight(name: str, weight: Tensor) -> LinearWeight | None:
    inner: Any = weight
    if not hasattr(inner, "qdata"):
        return None
    scheme: Scheme
    if getattr(inner, "target_dtype", None) == INT4:
        scheme = "w4a16"
    elif inner.qdata.dtype == torch.int8:
        scheme = "w8a8" if getattr(inner, "act_quant_kwargs", None) is not None else "int8"
    else:
        scheme = "fp8"
    zero = getattr(inner, "zero_point", None)
    if zero is None:
        zero = torch.zeros_like(inner.scale, dtype=torch.int8)
    return LinearWeight(name=name, scheme=scheme, whole=inner.qdata, scale=inner.scale, zero_point=zero)
