"""What is in a data set, before anything is computed about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from nvila.data.readers.record import Record, RecordStream

EXAMPLES = 5


@dataclass(slots=True, kw_only=True)
class Description:
    """Counts over the records of a stream.

    Args:
        name: Name of the data set.
        num_records: Records that were read.
        complete: Whether these are all there are.
        sources: Usable records by source.
        media: Usable records by what they are about: `text`, `image`, `images`, `video` ...
        num_turns: Messages of the usable records.
        num_problems: Records that cannot be used.
        problems: The first few of them.
    """

    name: str
    num_records: int = 0
    complete: bool = True
    sources: Counter[str] = field(default_factory=Counter)
    media: Counter[str] = field(default_factory=Counter)
    num_turns: int = 0
    num_problems: int = 0
    problems: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Count one more record."""
        self.num_records += 1
        if record.sample is None:
            self.num_problems += 1
            if len(self.problems) < EXAMPLES:
                self.problems.append(record)
            return
        self.sources[record.sample.source] += 1
        self.media[_media(record)] += 1
        self.num_turns += len(record.sample.messages)


def describe(stream: RecordStream, limit: int | None = None) -> Description:
    """Read records and count them; media are not read.

    Args:
        stream: The data set.
        limit: Records to look at; None looks at all.

    Raises:
        DataError: The data set cannot be read.
    """
    found = Description(name=stream.name)
    # One more than wanted tells whether there are more.
    for record in stream.records(0, None if limit is None else limit + 1):
        if limit is not None and record.index >= limit:
            found.complete = False
            break
        found.add(record)
    return found


def _media(record: Record) -> str:
    """Name the kinds of media: one image is `image`, several are `images`, none is `text`."""
    assert record.sample is not None
    kinds = Counter(part.type for message in record.sample.messages for part in message.content if part.type != "text")
    return " and ".join(f"{kind}{'s' if count > 1 else ''}" for kind, count in sorted(kinds.items())) or "text"
