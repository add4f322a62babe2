"""Sequence packing: several samples in a row, none of which sees another.

Padding is work for nothing; rows filled with whole samples have next to none. Every sample's positions start at 0 and
its first token is never a label, so a packed row gives exactly the likelihoods of its samples taken one by one. What
keeps samples apart depends on the attention: a mask of allowed pairs for eager and SDPA, the lengths of the samples
for flash attention, which then skips the other pairs altogether.

Shape suffixes: B rows, L longest row, N positions of all rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nvila.data.collation import PADDING_SEGMENT, PREFIX_SEGMENT, Batch, lay_out
from nvila.data.conversation import Encoded
from nvila.errors import CapabilityError, ConfigError, DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatBatch:
    """All samples of a batch in one row without padding, for attention over sequences of different lengths.

    Args:
        input_ids: (1, N).
        labels: (1, N).
        position_ids: (1, N), starting at 0 in every sample; backends that take no lengths read them off here.
        cu_seqlens: (samples + 1,) int32, where each sample starts, and N.
        max_seqlen: Length of the longest sample.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    def model_inputs(self) -> dict[str, Tensor | int]:
        """Return the keyword arguments of a training forward pass, media aside."""
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_seqlen,
            "max_length_k": self.max_seqlen,
            # With a cache, backends that read the samples off their positions would not look for them.
            "use_cache": False,
        }


def pack(samples: Sequence[Encoded], max_length: int) -> list[list[Encoded]]:
    """Deal samples to as few rows as a good guess finds: longest first, each into the fullest row that has room.

    Args:
        samples: Any number.
        max_length: Longest row in tokens.

    Returns:
        The rows, in the order of the first of their samples; samples of a row keep their order too. The same samples
        always give the same rows.

    Raises:
        DataError: A sample is longer than a row.
    """
    return [[samples[index] for index in row] for row in pack_lengths([len(one.ids) for one in samples], max_length)]


def pack_lengths(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Deal samples of the given lengths to rows as `pack` does, and return their positions."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    if order and (longest := lengths[order[0]]) > max_length:
        raise DataError(
            f"sample {order[0]} has {longest} tokens, more than the {max_length} of a packed row",
            "raise model.max_length or shorten the sample",
        )
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left in each row that is not full, and its number, least first
    for index in order:
        length = lengths[index]
        fits = bisect_left(room, (length, -1))
        if fits == len(room):
            left, row = max_length, len(rows)
            rows.append([])
        else:
            left, row = room.pop(fits)
        rows[row].append(index)
        if left > length:
            insort(room, (left - length, row))
    return sorted(map(sorted, rows))


def collate_packed(rows: Sequence[Sequence[Encoded]], pad_token_id: int, *, pad_to_multiple_of: int = 1) -> Batch:
    """Build a batch of packed rows for eager and SDPA attention; `flatten` turns it into one for flash attention.

    Args:
        rows: Samples of each row, as `pack` deals them.
        pad_token_id: Id written at padded positions.
        pad_to_multiple_of: Pad rows to such a length; FP8 products want multiples of 16, the reference takes 128.

    Raises:
        ConfigError: `pad_to_multiple_of` is below 1.
    """
    if pad_to_multiple_of < 1:
        raise ConfigError(f"pad_to_multiple_of is {pad_to_multiple_of}", "use 1 or more")
    return lay_out(rows, [0] * len(rows), pad_token_id, pad_to_multiple_of=pad_to_multiple_of)


def flatten(batch: Batch) -> FlatBatch:
    """Put all samples of a batch into one row without padding; media keep their order.

    Raises:
        CapabilityError: Samples of the batch share a prefix, which only a mask of pairs can express.
    """
    if bool((batch.segments == PREFIX_SEGMENT).any()):
        raise CapabilityError(
            "samples that share a prefix cannot be told apart by their lengths",
            "use attention sdpa, or rows of collate_packed",
        )
    real_BL = batch.segments != PADDING_SEGMENT
    position_ids = batch.position_ids[real_BL]
    starts = [*(position_ids == 0).nonzero().flatten().tolist(), len(position_ids)]
    return FlatBatch(
        input_ids=batch.input_ids[real_BL].unsqueeze(0),
        labels=batch.labels[real_BL].unsqueeze(0),
        position_ids=position_ids.unsqueeze(0),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=max(end - start for start, end in pairwise(starts)),
    )
