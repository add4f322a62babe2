"""Batches in which all samples about the same images share one row, one image encoding and one prefix.

A row is the common beginning of its samples (system turn, images) followed by the rest of each sample. A sample
sees the prefix and itself, never its neighbours, and its positions continue from the prefix; so the row gives
exactly the likelihoods of the samples taken one by one, at a fraction of the tokens. Ordinary packing is the case
of an empty prefix, an ordinary batch that of one sample a row.

Shape suffixes: B rows, L longest row, T images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from nvila.data.conversation import Encoded
from nvila.losses import IGNORE_INDEX

PREFIX_SEGMENT = 0
PADDING_SEGMENT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tensors of one forward pass.

    `segments` (B, L) tells which sample of its row a position belongs to, counted from 1; 0 is the shared prefix and
    -1 padding. `attention_mask` follows from it: see `attention_mask`. `images` and `videos` are the keys of the media
    in the order of their placeholders.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segments: Tensor
    attention_mask: Tensor
    images: tuple[str, ...]
    num_samples: int
    videos: tuple[str, ...] = ()

    @property
    def num_supervised(self) -> int:
        """How many tokens the loss looks at."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        """Positions that are not padding."""
        return int((self.segments != PADDING_SEGMENT).sum())


def collate(groups: Sequence[Sequence[Encoded]], pad_token_id: int) -> Batch:
    """Build a batch with one row for every group.

    Args:
        groups: Samples that share the same images, in rows.
        pad_token_id: Id written at padded positions.

    Returns:
        The batch, with the mask that `attention_mask` makes.
    """
    rows = [_row(group) for group in groups]
    width = max(len(ids) for ids, *_ in rows)

    def padded(column: int, fill: int) -> Tensor:
        return torch.tensor([row[column] + [fill] * (width - len(row[column])) for row in rows])

    segments_BL = padded(3, PADDING_SEGMENT)
    shown = [sample for group in groups for sample in _with_media(group)]
    return Batch(
        input_ids=padded(0, pad_token_id),
        labels=padded(1, IGNORE_INDEX),
        position_ids=padded(2, 0),
        segments=segments_BL,
        attention_mask=attention_mask(segments_BL),
        images=tuple(key for sample in shown for key in sample.images),
        videos=tuple(key for sample in shown for key in sample.videos),
        num_samples=sum(len(group) for group in groups),
    )


def attention_mask(segments_BL: Tensor) -> Tensor:
    """Return the boolean mask that keeps samples apart: (B, 1, L, L) of allowed pairs, or (B, L) of what is no padding.

    Rows of one sample each need no pairs. Their mask is linear in tokens, and attention is free to use its causal
    kernels.
    """
    padding_or_only = (segments_BL == PADDING_SEGMENT) | (segments_BL == 1)
    return segments_BL != PADDING_SEGMENT if bool(padding_or_only.all()) else pair_mask(segments_BL)


def pair_mask(segments_BL: Tensor) -> Tensor:
    """Return which position may look at which: earlier ones of the same sample or of the prefix, and itself."""
    query_BL1, key_B1L = segments_BL.unsqueeze(2), segments_BL.unsqueeze(1)
    # In place, because the mask is the largest tensor of a batch.
    allowed = key_B1L == query_BL1
    prefix_B1L = key_B1L == PREFIX_SEGMENT
    if bool(prefix_B1L.any()):
        allowed |= prefix_B1L
    return allowed.tril_().unsqueeze(1)


def shared_prefix_length(group: Sequence[Encoded]) -> int:
    """Length of the common beginning that a row may share.

    At least one unsupervised token stays with every sample, because a sample's first token is not predicted by the
    position before it in the row.
    """
    if len(group) == 1 or len({(sample.images, sample.videos) for sample in group}) > 1:
        return 0
    columns = zip(*(sample.ids for sample in group), strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    first_label = min(_first_supervised(sample.labels) for sample in group)
    shared = max(0, min(common, first_label - 1))
    # Media behind the common part belong to single samples; then nothing is shared.
    return shared if shared >= group[0].media_end else 0


def _with_media(group: Sequence[Encoded]) -> Sequence[Encoded]:
    return group[:1] if shared_prefix_length(group) else group


def _first_supervised(labels: Sequence[int]) -> int:
    return next((index for index, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))


def _row(group: Sequence[Encoded]) -> tuple[list[int], list[int], list[int], list[int]]:
    shared = shared_prefix_length(group)
    ids, labels = list(group[0].ids[:shared]), [IGNORE_INDEX] * shared
    positions, segments = list(range(shared)), [PREFIX_SEGMENT] * shared
    for number, sample in enumerate(group, start=1):
        ids += sample.ids[shared:]
        labels += sample.labels[shared:]
        positions += range(shared, len(sample.ids))
        segments += [number] * (len(sample.ids) - shared)
    return ids, labels, positions, segments
