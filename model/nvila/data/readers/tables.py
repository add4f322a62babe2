"""What Parquet and Arrow files have in common: named columns, decoded a few rows at a time."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from itertools import repeat
from typing import Any, BinaryIO

from nvila.data.readers.packages import package
from nvila.data.readers.rows import Row, Rows
from nvila.data.readers.shapes import CONVERSATION_FIELDS
from nvila.errors import DataError

# Rows decoded at a time, each maybe with an image.
BATCH_ROWS = 64


class TableRows(Rows):
    """The rows of an open table."""

    def __init__(self) -> None:
        self._errors = (OSError, package("pyarrow").ArrowException)
        self._rows: Iterator[Row] = iter(())
        self._batch: Any = None  # what of the last batch is not yet in `_rows`

    def __next__(self) -> Row:
        row = next(self._rows, None)
        while row is None:
            batch = self._undecoded()
            if batch is not None:
                self._batch = None if batch.num_rows <= BATCH_ROWS else batch.slice(BATCH_ROWS)
                self._rows = _decoded(batch.slice(0, BATCH_ROWS))
            row = next(self._rows, None)
        return row

    def skip(self, count: int) -> int:
        """Drop rows; those that are not decoded yet never are."""
        skipped = 0
        while True:
            while skipped < count and next(self._rows, None) is not None:
                skipped += 1
            if self._batch is None:
                skipped += self._skip_unread(count - skipped)
            if skipped == count:
                return skipped
            try:
                batch = self._undecoded()
            except StopIteration:
                return skipped
            if batch is not None:
                dropped = min(batch.num_rows, count - skipped)
                skipped += dropped
                self._batch = batch.slice(dropped) if dropped < batch.num_rows else None

    @abstractmethod
    def _next_batch(self) -> Any:
        """Return the next record batch, None at the end."""

    @abstractmethod
    def _num_lost(self) -> int:
        """Give up the part of the file that cannot be read, and return how many rows that are."""

    def _skip_unread(self, count: int) -> int:
        """Drop up to `count` rows that lie before the next batch, where the file allows it; return how many."""
        return 0

    def _undecoded(self) -> Any:
        """Return rows to decode; None when some are lost instead, which `_rows` then says."""
        try:
            batch = self._next_batch() if self._batch is None else self._batch
        except self._errors as e:
            self._rows = repeat(Row(problem=f"the table is damaged here: {e}"), self._num_lost())
            return None
        if batch is None:
            raise StopIteration
        return batch


def _decoded(batch: Any) -> Iterator[Row]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        yield from map(_decoded_alone, (batch.slice(index, 1) for index in range(batch.num_rows)))
        return
    for row in rows:
        yield Row(fields=row)


def _decoded_alone(batch: Any) -> Row:
    try:
        return Row(fields=batch.to_pylist()[0])
    except UnicodeDecodeError as e:
        return Row(problem=f"a text is no UTF-8: {e}")


class BoundedFile:
    """A file of which never more is read than it has; a damaged length would take memory before it is found wrong.

    Args:
        file: An open file that can seek.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = file.seek(0, io.SEEK_END)
        file.seek(0)

    def read(self, size: int | None = -1) -> bytes:
        """Read up to `size` bytes, or all that are left."""
        left = max(0, self._size - self._file.tell())
        return self._file.read(left if size is None or size < 0 else min(size, left))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def wanted_columns(columns: Sequence[str], fields: Collection[str], where: str) -> list[str]:
    """Return the columns that are read.

    Raises:
        DataError: None of them can hold a conversation.
    """
    wanted = [column for column in columns if column in fields]
    if not wanted:
        raise DataError(
            f"{where} has no column that is known, only {', '.join(columns)}",
            f"rename columns to {', '.join(CONVERSATION_FIELDS)}",
        )
    return wanted
