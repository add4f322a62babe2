"""A held-out split of any data: the same samples every time, and no image on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from nvila.data.readers.record import CountedStream, Record
from nvila.data.sample_encoding import media_of
from nvila.errors import DataError

_STEPS = 2**32


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Positions of the two sides of a data set, and of records that neither can use."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]


def split(stream: CountedStream, share: float, *, most: int | None = None, seed: int = 0) -> Split:
    """Deal the records of a data set to training and held-out samples.

    Samples that share their first medium, or their id where they have none, stay together. Which side they come to
    depends on that key and the seed alone, so more data later moves nothing.

    Args:
        stream: The data set, passed by once.
        share: Share of held-out samples, from 0 to 1.
        most: Most held-out samples; the others train.
        seed: Deals anew.

    Raises:
        DataError: One of the sides is empty.
    """
    ranked: dict[str, list[int]] = {}
    for record in stream.records():
        ranked.setdefault(_key(record), []).append(record.index)
    places = {key: _place(key, seed) for key in ranked}
    chosen: list[int] = []
    for key in sorted(ranked, key=places.__getitem__):
        group = ranked[key]
        if places[key] >= share * _STEPS or (most is not None and chosen and len(chosen) + len(group) > most):
            break
        chosen += group
    total = sum(map(len, ranked.values()))
    if share > 0 and not chosen and len(ranked) > 1:
        chosen = list(ranked[min(ranked, key=places.__getitem__)])
    held_out = set(chosen)
    if total and (len(held_out) == total or (share > 0 and not held_out)):
        side = "training" if held_out else "held out"
        raise DataError(
            f"{stream.name} has {total} samples about {len(ranked)} images: nothing is left for {side}",
            "bring more images, or leave the held-out split out with --held-out 0",
        )
    order = sorted(index for group in ranked.values() for index in group)
    return Split(train=tuple(i for i in order if i not in held_out), held_out=tuple(sorted(held_out)))


class Chosen:
    """Some records of a stream, numbered anew.

    Args:
        stream: All records.
        name: Name of the choice.
        positions: Which of them, in rising order.
    """

    def __init__(self, stream: CountedStream, name: str, positions: tuple[int, ...]) -> None:
        assert all(a < b for a, b in pairwise(positions))
        self._stream, self._name, self._positions = stream, name, positions

    @property
    def name(self) -> str:
        """Name of the choice."""
        return self._name

    def count(self) -> int:
        """Return the number of records."""
        return len(self._positions)

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Yield the records with start <= index < stop."""
        wanted = self._positions[start:stop]
        if not wanted:
            return
        numbers = {position: start + number for number, position in enumerate(wanted)}
        for record in self._stream.records(wanted[0], wanted[-1] + 1):
            if record.index in numbers:
                yield replace(record, index=numbers[record.index])


def _key(record: Record) -> str:
    if record.sample is None:
        # Goes to the training side, whose index tells what is wrong with it.
        return f"\0{record.index}"
    media = [key for _, key in media_of(record.sample)]
    return media[0] if media else record.sample.id


def _place(key: str, seed: int) -> int:
    if key.startswith("\0"):
        return _STEPS
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=4).digest(), "big")
