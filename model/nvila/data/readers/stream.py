"""A data set of files as one stream of records."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nvila.data.readers.parsing import RecordParser
from nvila.data.readers.record import Record
from nvila.data.readers.rows import DataFile, Format, Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One file of a data set: how it is opened, and how its rows become records."""

    file: DataFile
    format: Format
    parse: RecordParser


class FileStream:
    """The records of files, one file after the other.

    Who reads on where the last reading stopped, in the same process, does not start over: consecutive ranges cost as
    much as one reading.

    Args:
        name: Name of the data set.
        parts: Its files in order.
    """

    def __init__(self, name: str, parts: Sequence[Part]) -> None:
        self._name = name
        self._parts = parts
        self._counts: dict[int, int] = {}  # rows of the files whose end was seen
        self._resting: _Cursor | None = None

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self._name

    def count(self) -> int:
        """Return the number of records; where no file says it, all are passed by once, without being parsed."""
        return sum(map(self._count_of, range(len(self._parts))))

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Yield the records with start <= index < stop.

        Raises:
            DataError: A file cannot be read.
        """
        cursor, self._resting = self._resting, None
        if cursor is None or cursor.position > start or cursor.pid != os.getpid():
            cursor = _Cursor(self._parts, self._counts)
        cursor.skip_to(start)
        try:
            while (stop is None or cursor.position < stop) and (record := cursor.next()) is not None:
                yield record
        except GeneratorExit:  # who reads has enough, nothing is wrong
            self._resting = cursor
            raise
        self._resting = cursor

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_resting": None}  # open files stay in this process

    def _count_of(self, number: int) -> int:
        if number not in self._counts:
            part = self._parts[number]
            count = part.format.count(part.file)
            if count is None:
                rows = part.format.open(part.file, part.parse.fields)
                try:
                    count = 0
                    while skipped := rows.skip(2**20):
                        count += skipped
                finally:
                    rows.close()
            self._counts[number] = count
        return self._counts[number]


class _Cursor:
    """A place in the files, with the file open that it is in."""

    def __init__(self, parts: Sequence[Part], counts: dict[int, int]) -> None:
        self.position = 0
        self.pid = os.getpid()  # a forked child shares the offsets of open files and must not move them
        self._parts = parts
        self._counts = counts
        self._number = 0  # of the file
        self._row = 0  # in the file
        self._rows: Rows | None = None

    def next(self) -> Record | None:
        """Return the next record, None at the end of the last file."""
        while self._number < len(self._parts):
            part = self._parts[self._number]
            rows = self._open(part)
            row = next(rows, None)
            if row is None:
                self._leave()
                continue
            record = part.parse(row, index=self.position, position=self._row)
            self.position += 1
            self._row += 1
            return record
        return None

    def skip_to(self, position: int) -> None:
        """Pass by the records before a position, or all when there are fewer."""
        while self.position < position and self._number < len(self._parts):
            part = self._parts[self._number]
            if self._rows is None:
                self._learn(part.format.count(part.file))
            count = self._counts.get(self._number)
            if count is not None and self.position + count - self._row <= position:
                self._leave()
                continue
            skipped = self._open(part).skip(position - self.position)
            self.position += skipped
            self._row += skipped
            if self.position < position:
                self._leave()

    def _open(self, part: Part) -> Rows:
        if self._rows is None:
            self._rows = part.format.open(part.file, part.parse.fields)
            self._learn(self._rows.count)
        return self._rows

    def _learn(self, count: int | None) -> None:
        if count is not None:
            self._counts.setdefault(self._number, count)

    def _leave(self) -> None:
        """Go on to the next file, whose records have their places also when this one ended early."""
        self.close()
        self.position += self._counts.setdefault(self._number, self._row) - self._row
        self._number += 1
        self._row = 0

    def close(self) -> None:
        """Close the open file, if there is one."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def __del__(self) -> None:
        self.close()
