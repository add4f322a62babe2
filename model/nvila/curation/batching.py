"""Batches of rows of like length, within a budget of tokens.

Rows that share nothing and rows that share images never stand in one batch: the former then need no mask of pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nvila.data.collation import shared_prefix_length
from nvila.data.conversation import Encoded

Row = tuple[int, ...]
"""Positions of the samples of one row."""


def batches(encoded: Mapping[int, Encoded], max_tokens: int) -> list[list[Row]]:
    """Deal samples to rows and rows to batches.

    Args:
        encoded: Samples by their position.
        max_tokens: Most positions of a batch, padding included; a longer row is a batch of its own.

    Returns:
        Batches of rows. The same samples always give the same batches.
    """
    lengths = {row: row_length([encoded[index] for index in row]) for row in _rows(encoded, max_tokens)}
    order = sorted(lengths, key=lambda row: (len(row) > 1, lengths[row], row))
    result: list[list[Row]] = []
    for row in order:
        fits = (
            result
            and (len(result[-1][0]) > 1) == (len(row) > 1)
            and lengths[row] * (len(result[-1]) + 1) <= max_tokens  # rows come in order of length
        )
        if fits:
            result[-1].append(row)
        else:
            result.append([row])
    return result


def row_length(group: Sequence[Encoded]) -> int:
    """Length of the row that a group of samples makes."""
    shared = shared_prefix_length(group)
    return shared + sum(len(sample.ids) - shared for sample in group)


def _rows(encoded: Mapping[int, Encoded], max_tokens: int) -> list[Row]:
    """Put samples with the same media into one row where they share a prefix, as long as it stays within the budget."""
    groups: dict[object, list[int]] = {}
    for index, sample in encoded.items():
        groups.setdefault((sample.images, sample.videos) if sample.images or sample.videos else index, []).append(index)
    rows: list[Row] = []
    for group in groups.values():
        shared = shared_prefix_length([encoded[index] for index in group])
        if not shared:
            rows += [(index,) for index in group]
            continue
        row: list[int] = []
        length = shared
        for index in group:
            added = len(encoded[index].ids) - shared
            if row and length + added > max_tokens:
                rows.append(tuple(row))
                row, length = [], shared
            row.append(index)
            length += added
        rows.append(tuple(row))
    return rows
