"""The language-model head: a projection onto the vocabulary, and what some decoders do to its logits."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

# How decoders name a factor on their logits (Cohere, Falcon-H1) or a divisor of them (Granite).
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)


class ShapedHead(nn.Linear):
    """A head whose logits are scaled, and bent to stay inside (-cap, cap).

    Args:
        in_features: Width of the decoder.
        out_features: Size of the vocabulary.
        scale: Factor on the logits.
        cap: Bound of the logits; None leaves them free.
    """

    def __init__(self, in_features: int, out_features: int, scale: float, cap: float | None) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.scale, self.cap = scale, cap

    def forward(self, input: Tensor) -> Tensor:
        """Map hidden states (..., H) to logits (..., V)."""
        logits = super().forward(input) * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def build_head(config: PreTrainedConfig) -> nn.Linear:
    """Build the head that belongs to a decoder's configuration; plain for most of them."""
    scale = 1.0
    for name in _FACTORS:
        scale *= _number(config, name) or 1.0
    for name in _DIVISORS:
        scale /= _number(config, name) or 1.0
    cap = _number(config, "final_logit_softcapping")
    width, vocabulary = cast("int", config.hidden_size), cast("int", config.vocab_size)
    if scale == 1.0 and cap is None:
        return nn.Linear(width, vocabulary, bias=False)
    return ShapedHead(width, vocabulary, scale, cap)


def _number(config: PreTrainedConfig, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
