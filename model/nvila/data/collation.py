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
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nvila.data.conversation import Encoded
from nvila.losses import IGNORE_INDEX

PREFIX_SEGMENT = 0
PADDING_SEGMENT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tensors of one forward pass.

    `segments` (B, L) tells which sample of its row a position belongs to, counted from 1; 0 is the shared prefix and
    -1 padding. `images` and `videos` are the keys of the media in the order of their placeholders.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segments: Tensor
    images: tuple[str, ...]
    num_samples: int
    videos: tuple[str, ...] = ()

    @property
    def attention_mask(self) -> Tensor:
        """The mask that `nvila.data.collation.attention_mask` makes, anew each time: flash attention needs none."""
        return attention_mask(self.segments)

    @property
    def num_supervised(self) -> int:
        """How many tokens the loss looks at."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        """Positions that are not padding."""
        return int((self.segments != PADDING_SEGMENT).sum())


def collate(groups: Sequence[Sequence[Encoded]], pad_token_id: int) -> Batch:
    """Build a batch with one row for every group; samples that share their media share their common beginning.

    Args:
        groups: Samples that share the same images, in rows.
        pad_token_id: Id written at padded positions.
    """
    return lay_out(groups, [shared_prefix_length(group) for group in groups], pad_token_id)


def lay_out(
    rows: Sequence[Sequence[Encoded]], shared: Sequence[int], pad_token_id: int, *, pad_to_multiple_of: int = 1
) -> Batch:
    """Build a batch, given the length of the common beginning of each row's samples.

    Args:
        rows: Samples of each row.
        shared: For every row how many tokens of its first sample stand for those of all; 0 for rows that share none.
        pad_token_id: Id written at padded positions.
        pad_to_multiple_of: Pad rows to such a length.
    """
    width = max(
        prefix + sum(len(sample.ids) - prefix for sample in row) for row, prefix in zip(rows, shared, strict=True)
    )
    shape = (len(rows), width + -width % pad_to_multiple_of)
    # One buffer, because asking the system for several costs more time than filling them.
    columns = np.empty((4, *shape), np.int64)
    columns[:] = np.array([pad_token_id, IGNORE_INDEX, 0, PADDING_SEGMENT]).reshape(4, 1, 1)
    input_ids, labels, position_ids, segments = columns
    count = np.arange(shape[1])
    for number, (row, prefix) in enumerate(zip(rows, shared, strict=True)):
        input_ids[number, :prefix] = row[0].ids[:prefix]
        position_ids[number, :prefix] = count[:prefix]
        segments[number, :prefix] = PREFIX_SEGMENT
        end = prefix
        for segment, sample in enumerate(row, start=1):
            start, end = end, end + len(sample.ids) - prefix
            input_ids[number, start:end] = sample.ids[prefix:]
            labels[number, start:end] = sample.labels[prefix:]
            # The position before a sample's first token is not its own and must not predict it.
            labels[number, start] = IGNORE_INDEX
            position_ids[number, start:end] = count[prefix : len(sample.ids)]
            segments[number, start:end] = segment
    # Samples that share a prefix show their media once.
    shown = [sample for row, prefix in zip(rows, shared, strict=True) for sample in (row[:1] if prefix else row)]
    return Batch(
        **dict(zip(("input_ids", "labels", "position_ids", "segments"), torch.from_numpy(columns), strict=True)),
        images=tuple(key for sample in shown for key in sample.images),
        videos=tuple(key for sample in shown for key in sample.videos),
        num_samples=sum(map(len, rows)),
    )


def attention_mask(segments_BL: Tensor) -> Tensor:
    """Return the boolean mask that keeps samples apart: (B, 1, L, L) of allowed pairs, or (B, L) of what is no padding.

    Rows of one sample each need no pairs. Their mask is linear in tokens, and attention is free to use its causal
    kernels.
    """
    padding_or_only = (segments_BL == PADDING_SEGMENT) | (segments_BL == 1)
    return segments_BL != PADDING_SEGMENT if bool(padding_or_only.all()) else pair_mask(segments_BL)


def pair_mask(segments_BL: Tensor) -> Tensor:
    """Return which position may look at which: earlier ones of the same sample or of the prefix, and itself.

    Only the blocks of allowed pairs are written; comparing every position with every other takes twice as long.
    """
    rows = segments_BL.cpu().numpy()
    allowed = np.zeros((*rows.shape, rows.shape[1]), np.bool_)
    triangle = np.tri(_longest_run(rows), dtype=np.bool_)
    for row, allowed_LL in zip(rows, allowed, strict=True):
        earlier: dict[int, list[slice]] = {}
        for run in _runs(row):
            segment, length = int(row[run.start]), run.stop - run.start
            allowed_LL[run, run] = triangle[:length, :length]
            for other in {segment, PREFIX_SEGMENT}:
                for seen in earlier.get(other, ()):
                    allowed_LL[run, seen] = True
            earlier.setdefault(segment, []).append(run)
    return torch.from_numpy(allowed).unsqueeze(1).to(segments_BL.device)


def shared_prefix_length(group: Sequence[Encoded]) -> int:
    """Length of the common beginning that a row may share.

    At least one unsupervised token stays with every sample, because a sample's first token is not predicted by the
    position before it in the row.
    """
    if len(group) == 1 or len({(sample.images, sample.videos) for sample in group}) > 1:
        return 0
    shortest = min(len(sample.ids) for sample in group)
    ids = np.array([sample.ids[:shortest] for sample in group])
    common = _first((ids != ids[0]).any(axis=0))
    first_label = min(_first(np.array(sample.labels) != IGNORE_INDEX) for sample in group)
    shared = max(0, min(common, first_label - 1))
    # Media behind the common part belong to single samples; then nothing is shared.
    return shared if shared >= group[0].media_end else 0


def _first(hits: NDArray[np.bool_]) -> int:
    """Index of the first hit, or the length when there is none."""
    return int(hits.argmax()) if hits.any() else len(hits)


def _runs(row: NDArray[np.int64]) -> list[slice]:
    """Stretches of equal segments."""
    cuts = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
    return [slice(start, end) for start, end in pairwise(cuts)]


def _longest_run(rows: NDArray[np.int64]) -> int:
    return max((run.stop - run.start for row in rows for run in _runs(row)), default=0)
