"""Moments in the answers about a video, as the time tokens of the model that is tuned (temporal localisation)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from nvila.data.readers.record import CountedStream, Record
from nvila.data.records import Message, Part, Sample
from nvila.data.video import load_video
from nvila.errors import DataError
from nvila.time_tokens import encode_times

_MOMENT = re.compile(r"<\d+(?:\.\d+)?>")


class TimedStream:
    """Records whose `<seconds>` are time tokens; those without a moment or without one video stay as they are.

    Args:
        stream: The records.
        num_time_tokens: Tokens from the beginning of a video to its end.
        token_format: How they are written.
    """

    def __init__(self, stream: CountedStream, num_time_tokens: int, token_format: str) -> None:
        self._stream, self._tokens, self._format = stream, num_time_tokens, token_format

    @property
    def name(self) -> str:
        """Name of the data."""
        return self._stream.name

    def count(self) -> int:
        """Return the number of records."""
        return self._stream.count()

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Yield the records with start <= index < stop; a video that cannot be read makes a bad record."""
        for record in self._stream.records(start, stop):
            yield self._timed(record)

    def _timed(self, record: Record) -> Record:
        sample = record.sample
        if sample is None or not any(_MOMENT.search(message.text) for message in sample.messages):
            return record
        videos = [part.value for message in sample.messages for part in message.content if part.type == "video"]
        if len(videos) != 1:
            return record
        try:
            duration = load_video(record.media[videos[0]].read(), num_frames=1).duration
            return replace(record, sample=self._encoded(sample, duration))
        except DataError as e:
            return replace(record, sample=None, media={}, problem=str(e))

    def _encoded(self, sample: Sample, duration: float) -> Sample:
        def part(one: Part) -> Part:
            if one.type != "text":
                return one
            return replace(one, value=encode_times(one.value, duration, self._tokens, self._format))

        messages = (Message(role=m.role, content=tuple(map(part, m.content))) for m in sample.messages)
        return replace(sample, messages=tuple(messages))
