"""The decoder of Llama and Qwen2 with few, large operations: for CPUs, where each small one costs as much as it does.

Per layer it makes two products fewer than the module (queries, keys and values together; gate and up together), one
operation of each norm, and none of what `transformers` does around a layer. With `int8` the weights are stored as
8-bit integers with one scale for every output, and multiplied without being widened first; the head stays wide.

It holds copies of the language model's weights.

Shape suffixes: T tokens of the step, H language width, Q query heads, K key-value heads, D head width, R rows that want
logits, V vocabulary, O outputs, I inputs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nvila.errors import CapabilityError
from nvila.inference.attention import StepBatch
from nvila.modeling import NVILAForConditionalGeneration

logger = logging.getLogger(__name__)

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


class _Sizes(NamedTuple):
    heads: int
    kv_heads: int
    width: int
    eps: float


class _Stages(NamedTuple):
    """What happens between one layer's attention and the next one's: as it is, or compiled."""

    enter: Callable[..., tuple[Tensor, Tensor, Tensor]]
    leave: Callable[..., Tensor]
    between: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


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
        self._sizes = _Sizes(
            int(config.num_attention_heads), int(config.num_key_value_heads), self._width, float(config.rms_norm_eps)
        )
        self._scaling = self._width**-0.5
        self._rotary = decoder.rotary_emb
        self._norm = decoder.norm.weight.detach()
        # The head stays wide: the likeliest token is decided here, by differences smaller than 8 bits can tell.
        self._head = _Wide(model.lm_head.weight.detach(), None)
        self._layers = [_fused(layer, product) for layer in decoder.layers]
        self._compiled: _Stages | None = None
        self._most_compiled = 0

    def __call__(self, embeds_TH: Tensor, batch: StepBatch, rows_R: Tensor) -> Tensor:
        """See `Decoder`."""
        x_TH = embeds_TH
        stages = self._compiled if self._compiled is not None and len(x_TH) <= self._most_compiled else _EAGER
        turns = self._turns(x_TH, batch.positions_T)
        query_TQD, key_TKD, value_TKD = stages.enter(x_TH, self._layers[0], turns, self._sizes)
        for number, layer in enumerate(self._layers):
            out_TQD = batch.attend(number, query_TQD, key_TKD, value_TKD, self._scaling)
            out_TI = out_TQD.reshape(len(x_TH), -1)
            if number + 1 == len(self._layers):
                x_TH = stages.leave(x_TH, out_TI, layer, self._sizes)
            else:
                x_TH, query_TQD, key_TKD, value_TKD = stages.between(
                    x_TH, out_TI, layer, self._layers[number + 1], turns, self._sizes
                )
        return self._head(_normed(x_TH[rows_R], self._norm, self._sizes))

    @torch.inference_mode()
    def compile(self, most_tokens: int) -> bool:
        """Compile what lies between the attentions, for steps of few tokens, and run it once so that no request waits.

        Args:
            most_tokens: Largest step that is compiled; longer ones, which hold prompts, run as before.

        Returns:
            Whether that worked; without a compiler a line is logged and everything runs as before.
        """
        from torch._dynamo.exc import TorchDynamoException

        compiled: Any = [torch.compile(stage, fullgraph=True, dynamic=True) for stage in _EAGER]
        stages = _Stages(*compiled)
        most = min(most_tokens, _MOST_PACKED)
        began = time.monotonic()
        try:
            for tokens in sorted({1, min(2, most), most}):
                self._try(stages, tokens)
        except TorchDynamoException as e:
            logger.warning("decoding is not compiled: %s", str(e).strip().partition("\n")[0])
            return False
        logger.info("decoding of up to %d tokens compiled in %.1f s", most, time.monotonic() - began)
        self._compiled, self._most_compiled = stages, most
        return True

    def _try(self, stages: _Stages, tokens: int) -> None:
        weight = self._norm
        x_TH = torch.zeros(tokens, len(weight), dtype=weight.dtype, device=weight.device)
        turns = self._turns(x_TH, torch.arange(tokens, device=weight.device))
        layer = self._layers[0]
        query_TQD, _, _ = stages.enter(x_TH, layer, turns, self._sizes)
        out_TI = torch.zeros_like(query_TQD).reshape(tokens, -1)
        stages.between(x_TH, out_TI, layer, layer, turns, self._sizes)
        stages.leave(x_TH, out_TI, layer, self._sizes)

    def _turns(self, x_TH: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        cos_1TD, sin_1TD = self._rotary(x_TH[None], positions_T[None])
        return cos_1TD[0][:, None], sin_1TD[0][:, None]


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


def _normed(x_TH: Tensor, weight_H: Tensor, sizes: _Sizes) -> Tensor:
    return F.rms_norm(x_TH, (x_TH.shape[-1],), weight_H, sizes.eps)


def _enter(x_TH: Tensor, layer: _Layer, turns: tuple[Tensor, Tensor], sizes: _Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Make queries, keys and values of a layer."""
    heads, kv_heads = sizes.heads, sizes.kv_heads
    qkv = layer.qkv(_normed(x_TH, layer.norm_in, sizes)).view(-1, heads + 2 * kv_heads, sizes.width)
    turned = _rotate(qkv[:, : heads + kv_heads], *turns)
    return turned[:, :heads], turned[:, heads:], qkv[:, heads + kv_heads :]


def _leave(x_TH: Tensor, out_TI: Tensor, layer: _Layer, sizes: _Sizes) -> Tensor:
    """Do what follows a layer's attention."""
    x_TH = x_TH + layer.out(out_TI)
    gate, up = layer.gate_up(_normed(x_TH, layer.norm_mlp, sizes)).chunk(2, -1)
    return x_TH + layer.down(F.silu(gate) * up)


def _between(
    x_TH: Tensor, out_TI: Tensor, layer: _Layer, after: _Layer, turns: tuple[Tensor, Tensor], sizes: _Sizes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leave a layer and enter the next one."""
    x_TH = _leave(x_TH, out_TI, layer, sizes)
    return x_TH, *_enter(x_TH, after, turns, sizes)


_EAGER = _Stages(_enter, _leave, _between)
