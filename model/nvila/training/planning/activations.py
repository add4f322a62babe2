"""Bytes that autograd keeps for the backward pass, counted layer by layer.

What a layer keeps was read off with saved-tensor hooks, and tests hold the formulas to the bytes that such hooks see.
Under bf16 and FP8 the residual stream and the statistics of norms stay in fp32 and products run in bf16: every linear
layer keeps its own cast of its input, and a cast of its weight. A layer that does not learn, but passes gradients on,
keeps its weights and no inputs.

Letters: H width, I inner width, Q width of all query heads, K width of all key heads, n positions of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from nvila.training.config import Attention

WIDE = 4
# Of DeepSpeed, in elements: what is gathered and summed at once, and what ZeRO 3 lets live beside its own share.
_BUCKET = 500_000_000
_LIVE = 1_000_000_000
_WHOLE_LOGITS = 2**24
_CHUNK_LOGITS = 2**25


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A transformer layer.

    Args:
        width: H.
        inner: I.
        heads: Query heads.
        queries: Q.
        keys: K.
        weights: Weights of its linear layers.
        gated: Whether it is a layer of a decoder (RMSNorm, gated MLP), not of a tower (LayerNorm, plain MLP).
    """

    width: int
    inner: int
    heads: int
    queries: int
    keys: int
    weights: int
    gated: bool


def block_bytes(block: Block, positions: int, row: int, *, half: bool, attention: Attention, trained: bool) -> int:
    """Count what one layer keeps, without the casts of its weights.

    Args:
        block: The layer.
        positions: Positions of all rows.
        row: Positions of one row, the padded ones included.
        half: Whether products run in bf16.
        attention: `eager` keeps the probabilities of every pair, `sdpa` none.
        trained: Whether its weights learn.
    """
    low = 2 if half else WIDE
    wide, narrow = _decoder_layer(block, half, trained) if block.gated else _tower_layer(block, half)
    if attention == "eager":
        # Keys and values are spread over all heads first. The softmax runs in fp32; bf16 keeps both forms.
        narrow += 3 * block.queries
        pairs = block.heads * row * (WIDE + low if half else WIDE)
    else:
        wide += block.heads
        narrow += block.queries + 2 * block.keys + (0 if trained else block.queries)
        pairs = 0
    return positions * (WIDE * wide + low * narrow + pairs)


def _decoder_layer(block: Block, half: bool, trained: bool) -> tuple[int, int]:
    """Numbers a position in fp32 and in the type of products, without attention."""
    if not trained:
        return 2 * block.width + 2, 3 * block.inner
    # bf16: query, key, value, output, gate and up each keep a cast of their own.
    inputs = (5 if half else 2) * block.width + block.queries
    return 4 * block.width + 2, inputs + 4 * block.inner


def _tower_layer(block: Block, half: bool) -> tuple[int, int]:
    return 2 * block.width + 4, (4 if half else 2) * block.width + block.queries + 2 * block.inner


def stack_bytes(
    block: Block,
    layers: int,
    positions: int,
    row: int,
    *,
    half: bool,
    attention: Attention,
    trained: bool,
    checkpointing: bool,
) -> int:
    """Count what a stack of layers keeps, casts of weights included.

    With gradient checkpointing that is the input of every layer, and one layer while it is computed again. Casts of
    weights that learn live to the end of the forward pass all the same: autocast keeps them for reuse.
    """
    one = block_bytes(block, positions, row, half=half, attention=attention, trained=trained)
    cast = 2 * block.weights if half else 0
    if not checkpointing:
        return layers * (one + cast)
    inputs = layers * positions * block.width * WIDE
    return inputs + one + (layers * cast if trained else cast)


def loss_bytes(supervised: int, vocabulary: int, width: int, *, half: bool, trained: bool) -> int:
    """Count what the loss takes: logits, whole or of one chunk, and the head's gradient that is made with them.

    Args:
        supervised: Positions that are learned.
        vocabulary: Rows of the head.
        width: H.
        half: Whether products run in bf16.
        trained: Whether the head learns.
    """
    low = 2 if half else WIDE
    cast = low * vocabulary * width if half else 0
    if supervised * vocabulary <= _WHOLE_LOGITS:
        # The logits in fp32, and their logarithms.
        return supervised * vocabulary * (2 * WIDE) + low * supervised * width + cast
    rows = min(supervised, max(1, _CHUNK_LOGITS // vocabulary))
    logits = rows * vocabulary * (WIDE + low)
    head = vocabulary * width * (WIDE + (low if half else 0)) if trained else 0
    return logits + head + cast + 2 * low * supervised * width


def buffer_bytes(total: int, trained: int, *, zero_stage: int, world: int) -> int:
    """Count what DeepSpeed needs to exchange weights and gradients, with its default sizes."""
    if zero_stage == 0 or world == 1:
        return WIDE * min(_BUCKET, trained) if world > 1 else 0
    bucket = WIDE * min(_BUCKET, trained)
    return bucket + (WIDE * min(_LIVE, total) if zero_stage == 3 else bucket)
