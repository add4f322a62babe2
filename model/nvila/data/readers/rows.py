"""What formats have in common: a data file opened as rows of named fields."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nvila.data.readers.locations import Location


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """One file of a data set.

    Args:
        location: The file.
        name: Its path below the data set, for messages and for the ids of records that have none.
    """

    location: Location
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a data file.

    Args:
        fields: Its fields; None when it could not be read.
        problem: Why it could not be read.
        id: What the container calls the row, when it has names for rows.
        place: Where in the file it is when the number of the row does not say it.
    """

    fields: Mapping[str, Any] | None = None
    problem: str | None = None
    id: str | None = None
    place: str | None = None


class Rows(ABC):
    """The rows of an open file, from front to back.

    A file that breaks off ends with one row that says so. `count` is the number of rows that the file claims, when it
    claims one.
    """

    count: int | None = None

    def __iter__(self) -> Iterator[Row]:
        return self

    @abstractmethod
    def __next__(self) -> Row:
        """Return the next row.

        Raises:
            DataError: The file can no longer be read.
        """

    def skip(self, count: int) -> int:
        """Drop rows and return how many there were to drop, at most `count`."""
        skipped = 0
        while skipped < count and next(self, None) is not None:
            skipped += 1
        return skipped

    @abstractmethod
    def close(self) -> None:
        """Close the file."""


class Format(ABC):
    """A kind of data file."""

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    @abstractmethod
    def open(self, file: DataFile, fields: Collection[str]) -> Rows:
        """Open a file.

        Args:
            file: The file.
            fields: Fields that somebody wants; others may be left out.

        Raises:
            DataError: It cannot be read, or is not of this format.
        """

    def count(self, file: DataFile) -> int | None:
        """Return the number of rows when that is cheap to know, else None."""
        return None
