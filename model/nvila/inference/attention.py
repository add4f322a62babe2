"""Attention of many requests at once over the block pool, without padding rows.

`transformers` calls one function for attention, chosen by name in the model's configuration. Ours takes the tokens of
all requests in one row and what belongs to whom from a keyword argument that the model's forward passes through. So
every decoder that lets its attention be replaced works, and nothing of it is written again.

Shape suffixes: T tokens of this step, Q query heads, K key-value heads, D head width, B requests of a group, L
positions of a request, S slots of the pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nvila.errors import CapabilityError
from nvila.inference.blocks import BlockPool

NAME = "nvila_blocks"
# Requests of one decode group are padded to the longest; a group is closed when that would waste more than this share.
_MOST_PADDING = 1.5


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens of one request in a step.

    Args:
        blocks: The request's block table; it reaches to the end of the new tokens.
        start: Position of the first new token.
        length: Number of new tokens.
    """

    blocks: Sequence[int]
    start: int
    length: int

    @property
    def end(self) -> int:
        """Positions of the request after this step."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Several new tokens of one request, or one whose blocks are neighbours."""

    tokens: slice
    slots: Tensor | slice
    mask: Tensor | None
    causal: bool


@dataclass(frozen=True, slots=True)
class _Group:
    """One new token of each of several requests."""

    tokens: Tensor
    blocks: Tensor
    mask: Tensor


class StepBatch(Protocol):
    """Where the tokens of a step stand, and how they attend."""

    positions_T: Tensor  # noqa: N815 - a shape suffix

    def attend(self, layer: int, query_TQD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scaling: float) -> Tensor:
        """See `BlockBatch.attend`."""


class BlockBatch:
    """What a step's attention reads and writes.

    Args:
        pool: The pool.
        spans: New tokens of every request, in the order of the row.
    """

    def __init__(self, pool: BlockPool, spans: Sequence[Span]) -> None:
        self._pool = pool
        self.spans = spans
        device = pool.keys[0].device
        self.positions_T = torch.tensor([at for span in spans for at in range(span.start, span.end)], device=device)
        self._slots_T = torch.tensor([slot for span in spans for slot in _slots(span, pool.block_size)], device=device)
        self._chunks: list[_Chunk] = []
        single: list[tuple[int, Span]] = []
        at = 0
        for span in spans:
            if span.length == 1:
                single.append((at, span))
            else:
                self._chunks.append(self._chunk(at, span))
            at += span.length
        self._groups: list[_Group] = []
        for group in _grouped(single, pool.block_size):
            if len(group) == 1:
                self._chunks.append(self._chunk(*group[0]))
            else:
                self._groups.append(self._group(group))

    def attend(self, layer: int, query_TQD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scaling: float) -> Tensor:
        """Store the new keys and values of one layer and attend to all of every request's own.

        Returns:
            Tensor of shape (T, Q, D).
        """
        keys_SKD, values_SKD = self._pool.keys[layer], self._pool.values[layer]
        keys_SKD.index_copy_(0, self._slots_T, key_TKD)
        values_SKD.index_copy_(0, self._slots_T, value_TKD)
        out_TQD = torch.empty_like(query_TQD)
        for chunk in self._chunks:
            out_TQD[chunk.tokens] = _attend_chunk(chunk, query_TQD[chunk.tokens], keys_SKD, values_SKD, scaling)
        for group in self._groups:
            query_BQD = query_TQD[group.tokens]
            out_TQD[group.tokens] = attend_padded(
                query_BQD, group.blocks, group.mask, keys_SKD, values_SKD, scaling, self._pool.block_size
            )
        return out_TQD

    def _chunk(self, at: int, span: Span) -> _Chunk:
        device = self._slots_T.device
        blocks, size = span.blocks[: self._pool.blocks_for(span.end)], self._pool.block_size
        slots: Tensor | slice
        if all(later == block + 1 for block, later in pairwise(blocks)):
            slots = slice(blocks[0] * size, blocks[0] * size + span.end)
        else:
            slots = torch.tensor(list(_slots(Span(span.blocks, 0, span.end), size)), device=device)
        mask = None
        if span.length > 1 and span.start:
            mask = torch.ones(span.length, span.end, dtype=torch.bool, device=device).tril_(span.start)
        return _Chunk(slice(at, at + span.length), slots, mask, causal=span.length > 1 and not span.start)

    def _group(self, group: Sequence[tuple[int, Span]]) -> _Group:
        device = self._slots_T.device
        counts = [self._pool.blocks_for(span.end) for _, span in group]
        tables = torch.zeros(len(group), max(counts), dtype=torch.long)
        for row, (count, (_, span)) in enumerate(zip(counts, group, strict=True)):
            tables[row, :count] = torch.tensor(span.blocks[:count])
        lengths = torch.tensor([span.end for _, span in group])
        mask = torch.arange(max(counts) * self._pool.block_size)[None] < lengths[:, None]
        return _Group(
            torch.tensor([at for at, _ in group], device=device), tables.to(device), mask[:, None, None].to(device)
        )


def _attend_chunk(chunk: _Chunk, query_TQD: Tensor, keys_SKD: Tensor, values_SKD: Tensor, scaling: float) -> Tensor:
    keys_LKD, values_LKD = keys_SKD[chunk.slots], values_SKD[chunk.slots]
    if len(query_TQD) == 1:
        # The query heads that share a key-value head stand where the queries of several positions would.
        query = query_TQD.view(1, keys_LKD.shape[1], -1, query_TQD.shape[-1])
        out = scaled_dot_product_attention(
            query, keys_LKD.transpose(0, 1)[None], values_LKD.transpose(0, 1)[None], scale=scaling
        )
        return out.reshape(query_TQD.shape)
    repeats = query_TQD.shape[1] // keys_LKD.shape[1]
    out = scaled_dot_product_attention(
        query_TQD.transpose(0, 1)[None],
        keys_LKD.transpose(0, 1).repeat_interleave(repeats, 0)[None],
        values_LKD.transpose(0, 1).repeat_interleave(repeats, 0)[None],
        attn_mask=chunk.mask,
        is_causal=chunk.causal,
        scale=scaling,
    )
    return out[0].transpose(0, 1)


def attend_padded(
    query_BQD: Tensor,
    tables: Tensor,
    mask: Tensor,
    keys_SKD: Tensor,
    values_SKD: Tensor,
    scaling: float,
    block_size: int,
) -> Tensor:
    """Attend with one query of each request, over block tables that are padded to one length.

    Args:
        query_BQD: Queries.
        tables: Blocks of every request (B, blocks), padded with block 0.
        mask: Which positions are the request's own (B, 1, 1, L).
        keys_SKD: Keys of the pool.
        values_SKD: Values of the pool.
        scaling: Factor of the products.
        block_size: Positions of a block.
    """
    rows, heads, width = query_BQD.shape
    kv_heads = keys_SKD.shape[1]

    def gathered(pool_SKD: Tensor) -> Tensor:
        blocks = pool_SKD.view(-1, block_size * kv_heads * width).index_select(0, tables.flatten())
        return blocks.view(rows, -1, kv_heads, width).transpose(1, 2)

    out = scaled_dot_product_attention(
        query_BQD.view(rows, kv_heads, -1, width),
        gathered(keys_SKD),
        gathered(values_SKD),
        attn_mask=mask,
        scale=scaling,
    )
    return out.reshape(rows, heads, width)


def _slots(span: Span, block_size: int) -> Iterator[int]:
    for at in range(span.start, span.end):
        yield span.blocks[at // block_size] * block_size + at % block_size


def _grouped(single: Sequence[tuple[int, Span]], block_size: int) -> list[list[tuple[int, Span]]]:
    """Group requests of like length, so that padding them to one length wastes little."""
    groups: list[list[tuple[int, Span]]] = []
    for one in sorted(single, key=lambda item: item[1].end):
        if groups and one[1].end <= _MOST_PADDING * groups[-1][0][1].end + 2 * block_size:
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def block_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    block_batch: StepBatch,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as `transformers` asks for it: one row (1, heads, T, D) in, (1, T, Q, D) out.

    Raises:
        CapabilityError: The model wants something of its attention that is not built here.
    """
    unknown = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if sliding_window is not None or unknown:
        raise CapabilityError(
            f"the engine has no attention with {unknown[0] if unknown else 'a sliding window'}",
            "answer with the model's generate",
        )
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return block_batch.attend(module.layer_idx, queries, keys, values, scaling)[None], None


@contextmanager
def attending_blocks(config: PreTrainedConfig) -> Iterator[None]:
    """Have the decoder of this configuration attend to blocks, for the time of one step."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, block_attention)
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


__all__ = ["BlockBatch", "Span", "StepBatch", "attend_padded", "attending_blocks", "block_attention"]
