"""What every reader yields: one record after the other, usable or with the reason why it is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from nvila.data.records import Sample


class MediaSource(Protocol):
    """The encoded bytes of one image or video, read when somebody asks."""

    def read(self) -> bytes:
        """Return the whole file.

        Raises:
            DataError: It is missing or cannot be read; the message names it.
            InfrastructureError: The service that has it does not answer, which says nothing about the medium.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record of a data set as it was read.

    Args:
        index: Position in the data set, from 0; the same on every reading. Where a damaged shard lacks records that it
            should have, so do their positions.
        where: File and place in it, for messages: `llava.jsonl:12`.
        sample: The record; None when it cannot be used.
        media: Where the bytes of each image and video of the sample are, by the key that the sample uses. Equal keys
            mean the same medium, also between data sets.
        problem: Why there is no sample; None when there is one.
        source: Source of a record without a sample, as far as that is known; one with a sample says it there.
    """

    index: int
    where: str
    sample: Sample | None
    media: Mapping[str, MediaSource] = field(default_factory=dict)
    problem: str | None = None
    source: str | None = None


class RecordStream(Protocol):
    """A data set that is read from front to back, as often as wanted, always in the same order."""

    @property
    def name(self) -> str:
        """Name of the data set or mixture."""

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Yield the records with start <= index < stop.

        What lies before `start` is skipped as cheaply as the format allows.

        Raises:
            DataError: The data set itself cannot be read; one bad record is a `Record` with a problem instead.
            InfrastructureError: The service that has it does not answer.
        """


class CountedStream(RecordStream, Protocol):
    """A stream that can say how many records it has; all that this project opens can."""

    def count(self) -> int:
        """Return the number of records; where nothing says it, by passing all of them by once.

        Raises:
            DataError: The data set cannot be read.
        """
