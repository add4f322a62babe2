"""The decoder of Llama and Qwen2 with few, large operations: for CPUs, where each small one costs as much as it does.

Per layer it makes two products fewer than the module (queries, keys and values together; gate and up together), one
operation of each norm, and none of what `transformers` does around a layer. With `int8` the weights are stored as
8-bit integers with one scale for every output, and multiplied without being widened first; the head stays wide.

It holds copies of the language model's weights.

Shape suffixes: T tokens of the step, H language width, Q query heads, K key-value heads, D head width, R rows that want
logits, V vocabulary, O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nvila.errors import CapabilityError
from nvila.inference.attention import BlockBatch
from nvila.modeling import NVILAForConditionalGeneration

FAMILIES = ("llama", "qwen2")
# With more tokens than this, widening the weights costs less than the packed product loses.
_MOST_PACKED = 16


class _Wide:
    """A product as it is."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._weight, self._bias = weight_OI, bias_O

    def __call__(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, self._weight, self._bias)


class _Int8:
    """A product with weights rounded to 8 bits, one scale for every output."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        scale_O1 = weight_OI.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        self._weight = (weight_OI.float() / scale_O1).round().to(torch.int8)
        self._scale = scale_O1[:, 0].to(weight_OI.dtype)
        self._bias = bias_O

    def __call__(self, x_TI: Tensor) -> Tensor:
        if len(x_TI) > _MOST_PACKED:
            # Whole numbers up to 127 are exact in every type, so this is the same product.
            out = F.linear(x_TI, self._weight.to(x_TI.dtype)) * self._scale
        else:
            out = torch._weight_int8pack_mm(x_TI, self._weight, self._scale)
        return out if self._bias is None else out + self._bias


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: _Wide | _Int8
    out: _Wide | _Int8
    gate_up: _Wide | _Int8
    down: _Wide | _Int8
    norm_in: Tensor
    norm_mlp: Tensor


class FusedDecoder:
    """See the module.

    Args:
        model: The model; its language model is a plain, unquantized Llama or Qwen2.
        int8: Whether products have 8-bit weights.

    Raises:
        CapabilityError: The language model is of another kind.
    """

    def __init__(self, model: NVILAForConditionalGeneration, *, int8: bool = False) -> None:
        if not fits(model):
            kind = model.config.text_config.model_type
            raise CapabilityError(
                f"the fused decoder knows unquantized {' and '.join(FAMILIES)} without adapters, not this '{kind}'",
                "use the decoder 'transformers'",
            )
        product = _Int8 if int8 else _Wide
        decoder: Any = model.model.language_model
        config: Any = decoder.config
        self._width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self._heads, self._kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self._scaling = self._width**-0.5
        self._eps = float(config.rms_norm_eps)
        self._rotary = decoder.rotary_emb
        self._norm = decoder.norm.weight.detach()
        # The head stays wide: the likeliest token is decided here, by differences smaller than 8 bits can tell.
        self._head = _Wide(model.lm_head.weight.detach(), None)
        self._layers = [_fused(layer, product) for layer in decoder.layers]

    def __call__(self, embeds_TH: Tensor, batch: BlockBatch, rows_R: Tensor) -> Tensor:
        """See `Decoder`."""
        x_TH = embeds_TH
        cos_T1D, sin_T1D = (one[0][:, None] for one in self._rotary(x_TH[None], batch.positions_T[None]))
        heads, kv_heads, width = self._heads, self._kv_heads, self._width
        for number, layer in enumerate(self._layers):
            qkv = layer.qkv(self._normed(x_TH, layer.norm_in)).view(-1, heads + 2 * kv_heads, width)
            turned = _rotate(qkv[:, : heads + kv_heads], cos_T1D, sin_T1D)
            out_TQD = batch.attend(
                number, turned[:, :heads], turned[:, heads:], qkv[:, heads + kv_heads :], self._scaling
            )
            x_TH = x_TH + layer.out(out_TQD.reshape(len(x_TH), -1))
            gate, up = layer.gate_up(self._normed(x_TH, layer.norm_mlp)).chunk(2, -1)
            x_TH = x_TH + layer.down(F.silu(gate) * up)
        return self._head(self._normed(x_TH[rows_R], self._norm))

    def _normed(self, x_TH: Tensor, weight_H: Tensor) -> Tensor:
        return F.rms_norm(x_TH, (x_TH.shape[-1],), weight_H, self._eps)


def fits(model: NVILAForConditionalGeneration) -> bool:
    """Whether the language model is one that is known here, with plain weights."""
    config: Any = model.config.text_config
    linear = [one for one in model.model.language_model.modules() if isinstance(one, nn.Linear)]
    plain = all(type(one) is nn.Linear and type(one.weight) is nn.Parameter for one in (*linear, model.lm_head))
    # The layer of an adapter has a weight too, that of its base.
    plain &= not any(hasattr(one, "base_layer") for one in model.model.language_model.modules())
    window = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    known = config.model_type in FAMILIES and config.hidden_act == "silu"
    return known and plain and not window and not getattr(config, "mlp_bias", False)


def _fused(layer: Any, product: type[_Wide] | type[_Int8]) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        qkv=_joined(product, attention.q_proj, attention.k_proj, attention.v_proj),
        out=_joined(product, attention.o_proj),
        gate_up=_joined(product, mlp.gate_proj, mlp.up_proj),
        down=_joined(product, mlp.down_proj),
        norm_in=layer.input_layernorm.weight.detach(),
        norm_mlp=layer.post_attention_layernorm.weight.detach(),
    )


def _joined(product: type[_Wide] | type[_Int8], *linear: nn.Linear) -> _Wide | _Int8:
    """Make one product of several that read the same."""
    # The stubs say that there is always one.
    given: list[Tensor | None] = [one.bias for one in linear]
    biases = [bias.detach() for bias in given if bias is not None]
    weight = torch.cat([one.weight.detach() for one in linear]) if len(linear) > 1 else linear[0].weight.detach()
    return product(weight, torch.cat(biases) if biases else None)


def _rotate(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Turn queries and keys by their positions (Su et al. 2021, halves as in Llama)."""
    first, second = x_THD.chunk(2, -1)
    return x_THD * cos_T1D + torch.cat((-second, first), -1) * sin_T1D
