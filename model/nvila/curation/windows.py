"""From a stream of records to windows: some records with their media decoded once, in bounded memory.

Media are known by what they are made of: records that show the same picture share it, whatever they call it. Equal
keys of neighbours are one medium, which is read once.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from nvila.curation.problems import Problem
from nvila.data.images import load_image
from nvila.data.readers.record import Record
from nvila.data.records import Message, Part, Sample
from nvila.data.video import Video, load_video
from nvila.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

WINDOW_RECORDS = 512
WINDOW_BYTES = 2**28
_DECODERS = 4
# Decoded ahead of the record that is looked at; more would only hold memory.
_AHEAD = 4 * _DECODERS

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FrameSampling:
    """How a model samples the frames of a video."""

    num_frames: int
    fps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Neighbouring records of a shard, ready for any model.

    Args:
        records: As they were read.
        samples: The sample of each record with digests of content as the keys of its media; or why there is none.
        images: Decoded images by digest.
        videos: Sampled videos by digest and sampling.
    """

    records: Sequence[Record]
    samples: Sequence[Sample | Problem]
    images: Mapping[str, Image.Image]
    videos: Mapping[tuple[str, FrameSampling], Video]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decoded:
    """One medium, decoded; the same for all records that show it."""

    images: dict[str, Image.Image]
    videos: dict[tuple[str, FrameSampling], Video]
    problem: Problem | None = None

    @property
    def num_bytes(self) -> int:
        return sum(3 * image.width * image.height for image in self.images.values()) + sum(
            video.frames.nbytes for video in self.videos.values()
        )


_Medium = tuple[str, "Future[_Decoded]"]
"""The digest of a medium, and its content as soon as that is decoded."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A record whose media are being decoded, by the key that the record has for them."""

    record: Record
    sample: Sample | Problem
    media: Mapping[str, _Medium]


def windows(
    records: Iterable[Record],
    samplings: frozenset[FrameSampling],
    *,
    max_records: int = WINDOW_RECORDS,
    max_bytes: int = WINDOW_BYTES,
) -> Iterator[Window]:
    """Cut a stream into windows; where they end depends on the records alone.

    Args:
        records: Records in order.
        samplings: How the models sample videos.
        max_records: Most records of a window.
        max_bytes: A window ends with the record whose decoded media reach this.
    """
    with ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode") as pool:
        held: list[_Held] = []
        seen: set[str] = set()
        size = 0
        for one in _submitted(records, samplings, pool):
            held.append(one)
            for digest, future in one.media.values():
                if digest not in seen:
                    seen.add(digest)
                    size += future.result().num_bytes
            if len(held) >= max_records or size >= max_bytes:
                yield _window(held)
                held, seen, size = [], set(), 0
        if held:
            yield _window(held)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items while a thread already makes the next one."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item


def _submitted(
    records: Iterable[Record], samplings: frozenset[FrameSampling], pool: ThreadPoolExecutor
) -> Iterator[_Held]:
    """Read records in order and have their media decoded some records ahead."""
    waiting: deque[_Held] = deque()
    for record in records:
        # Questions about one picture stand together, so remembering the neighbours is enough.
        known = {key: medium for held in waiting for key, medium in held.media.items()}
        decoding = dict(known.values())
        sample, encoded = _read(record, known.keys())
        media = {key: known[key] for key in record.media if key in known}
        for key, (kind, data) in encoded.items():
            digest = hashlib.blake2b(data, digest_size=16).hexdigest()
            if digest not in decoding:
                decoding[digest] = pool.submit(_decode, digest, kind, data, samplings)
            media[key] = (digest, decoding[digest])
        waiting.append(_Held(record, sample, media))
        if len(waiting) > _AHEAD:
            yield waiting.popleft()
    yield from waiting


def _read(record: Record, known: Container[str]) -> tuple[Sample | Problem, dict[str, tuple[str, bytes]]]:
    """Read the bytes of a record's media by key, but for those that are known."""
    if record.sample is None:
        reason = record.problem or "the reader gave no reason"
        return Problem(status="no_answer" if reason.startswith("no answer") else "unreadable", reason=reason), {}
    if not record.sample.answer.strip():
        return Problem(status="no_answer", reason="the last turn is no answer of the assistant"), {}
    encoded: dict[str, tuple[str, bytes]] = {}
    try:
        for part in (part for message in record.sample.messages for part in message.content if part.type != "text"):
            if part.value not in record.media:
                return Problem(status="bad_media", reason=f"{part.type} '{part.value}' is nowhere"), {}
            if part.value not in known and part.value not in encoded:
                encoded[part.value] = (part.type, record.media[part.value].read())
    except DataError as e:  # anything else, such as a store that does not answer, is no fault of the record
        return Problem(status="bad_media", reason=str(e)), {}
    return record.sample, encoded


def _renamed(sample: Sample, media: Mapping[str, _Medium]) -> Sample:
    def rename(part: Part) -> Part:
        return part if part.type == "text" else Part(type=part.type, value=media[part.value][0])

    return replace(
        sample,
        messages=tuple(
            Message(role=message.role, content=tuple(map(rename, message.content))) for message in sample.messages
        ),
    )


def _decode(digest: str, kind: str, data: bytes, samplings: frozenset[FrameSampling]) -> _Decoded:
    try:
        if kind == "image":
            return _Decoded(images={digest: load_image(data)}, videos={})
        videos = {
            (digest, how): load_video(data, num_frames=how.num_frames, fps=how.fps)
            for how in sorted(samplings, key=lambda how: (how.num_frames, how.fps))
        }
        return _Decoded(images={}, videos=videos)
    except DataError as e:
        return _Decoded(images={}, videos={}, problem=Problem(status="bad_media", reason=str(e)))


def _window(held: Sequence[_Held]) -> Window:
    decoded = {digest: future.result() for one in held for digest, future in one.media.values()}
    samples: list[Sample | Problem] = []
    for one in held:
        problems = (decoded[digest].problem for digest, _ in one.media.values())
        problem = next((problem for problem in problems if problem is not None), None)
        sample = one.sample if isinstance(one.sample, Problem) else problem or _renamed(one.sample, one.media)
        samples.append(sample)
    return Window(
        records=[one.record for one in held],
        samples=samples,
        images={key: image for one in decoded.values() for key, image in one.images.items()},
        videos={key: video for one in decoded.values() for key, video in one.videos.items()},
    )


__all__ = ["FrameSampling", "Window", "ahead", "windows"]
