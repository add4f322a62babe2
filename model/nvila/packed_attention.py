"""Attention that stays within the samples of a packed row, for devices and types that flash attention does not serve.

With a mask of pairs a kernel computes every pair of a row and throws most of them away. Here each sample is attended
to by itself, causally, so no mask is made, and the work is that of the samples taken one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "nvila_packed_sdpa"


def use_packed_attention(language_model: Any) -> None:
    """Let a decoder take batches of `nvila.data.packing.flatten`; all others are attended to as with `sdpa`.

    Rows of several samples must come with their lengths or with a mask of pairs: from positions that start again, which
    transformers understands too, this implementation makes no mask. A decoder with layers that see a window only stays
    as it is.

    Args:
        language_model: A decoder of transformers.
    """
    if not can_join_rows(language_model.config):
        return
    AttentionInterface.register(PACKED_SDPA, attend_within_samples)
    AttentionMaskInterface.register(PACKED_SDPA, _mask)
    language_model.set_attn_implementation(PACKED_SDPA)


def can_join_rows(text_config: Any) -> bool:
    """Whether `use_packed_attention` can be followed by a decoder of this configuration."""
    return set(getattr(text_config, "layer_types", None) or ["full_attention"]) == {"full_attention"}


def joins_rows(language_model: Any) -> bool:
    """Whether `use_packed_attention` was called for a decoder and could be followed."""
    return bool(language_model.config._attn_implementation == PACKED_SDPA)


def attend_within_samples(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as `sdpa` does, to each sample alone where their lengths are given.

    Args:
        module: The attention layer.
        query: (B, heads, L, width of a head); with lengths B is 1 and L all positions of the batch.
        key: The same, with as many heads as the layer has for keys.
        value: Like the keys.
        attention_mask: None with lengths.
        cu_seq_lens_q: (samples + 1,) where each sample starts, and L. On the CPU, so that a device need not be asked.
        **options: What transformers passes to all implementations.

    Returns:
        (B, L, heads, width of a head), and no weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    lengths = cu_seq_lens_q.diff().tolist()
    options["is_causal"] = True
    parts = [
        sdpa_attention_forward(module, *sample, None, **options)[0]
        for sample in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(parts, 1), None


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """Make the mask of `sdpa`, but none for a whole row without padding, where causal attention needs none."""
    whole = options.get("attention_mask") is None and options.get("q_length") == options.get("kv_length")
    return None if whole else sdpa_mask(*args, **options)
