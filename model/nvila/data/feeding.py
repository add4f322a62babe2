"""Feeding a training stage: the batches of a sampler with their media, read and decoded ahead of need.

One thread takes steps from the sampler, tokenises their samples and has their media decoded by others; a few steps at
most are in memory. What comes is the same whoever is faster. The position in the data is that of the last step that
was taken, not of what was read ahead.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nvila.data.conversation import Encoded
from nvila.data.media_tiles import MediaReader, MediaSize, MediaTiles
from nvila.data.readers.record import MediaSource
from nvila.data.sample_encoding import Medium, SampleEncoder
from nvila.data.sample_store import SampleStore, StoredSample, check_bad
from nvila.data.token_budget import TokenBudgetSampler
from nvila.errors import DataError
from nvila.losses import IGNORE_INDEX

MicroBatch = list[list[Encoded]]
"""Rows of a forward pass, each of them one or more samples."""

_WAIT_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """A sample on its way, with its media."""

    number: int
    stored: StoredSample
    encoded: Encoded
    media: Mapping[Medium, Future[MediaTiles]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    micro_batches: list[list[list[_Loaded]]]
    state: dict[str, Any]


class BatchFeed:
    """Micro-batches of one process for every step of a stage, and the pixels of their media.

    A sample whose medium cannot be read is left out of its row, counted and quarantined; which samples those are does
    not depend on the number of processes. A micro-batch that has nothing left, or never had, is a row of padding: it
    adds nothing to the loss and keeps the processes in step.

    Args:
        store: The samples.
        sampler: Which of them go into which step.
        encoder: Tokenises them.
        reader: Decodes their media.
        pad_token_id: Stands in rows of padding.
        bad: Keeps count of what cannot be read.
        ahead: Steps that are read ahead.
        threads: Threads that decode.
    """

    def __init__(
        self,
        store: SampleStore,
        sampler: TokenBudgetSampler,
        encoder: SampleEncoder,
        reader: MediaReader,
        *,
        pad_token_id: int,
        bad: BadMedia,
        ahead: int = 2,
        threads: int = 4,
    ) -> None:
        self._store, self._sampler, self._encoder, self._reader = store, sampler, encoder, reader
        self._bad = bad
        self._idle = Encoded(ids=(pad_token_id,) * 2, labels=(IGNORE_INDEX,) * 2, images=(), media_end=0)
        self._ahead, self._threads = ahead, threads
        self._state = sampler.state_dict()
        self._tiles: dict[Medium, MediaTiles] = {}
        self._producer: _Producer | None = None
        self.waited_s = 0.0
        """Seconds that the caller has waited for data."""

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        """Return the next step's micro-batches of this process; there is always one.

        Raises:
            DataError: More samples than `max_bad` cannot be read.
            InfrastructureError: A service that has data does not answer.
        """
        started = time.perf_counter()
        if self._producer is None:
            self._producer = _Producer(self._steps, self._ahead, self._threads)
        step = self._producer.take()
        self._tiles = {}
        micro_batches = [self._micro_batch(rows) for rows in step.micro_batches]
        self._state = step.state
        self.waited_s += time.perf_counter() - started
        return micro_batches

    def tensors(self, images: Sequence[str], videos: Sequence[str]) -> dict[str, Tensor]:
        """Return the pixel arguments of `NVILAForConditionalGeneration.forward` for media of the current step.

        Args:
            images: Keys of the images of a batch, in the order of their placeholders.
            videos: Keys of its videos, likewise.
        """
        return self._reader.inputs(
            [self._tiles["image", key] for key in images], [self._tiles["video", key] for key in videos]
        )

    @property
    def directory(self) -> Path:
        """Folder of the index."""
        return self._store.directory

    def steps_in(self, epochs: float) -> int:
        """Count the steps of so many passes over the data."""
        return self._sampler.num_steps(epochs)

    def state_dict(self) -> dict[str, Any]:
        """Return the position behind the last step that was taken; it fits any number of processes."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position.

        Raises:
            CheckpointError: It belongs to other data.
        """
        self.close()
        self._sampler.load_state_dict(state)
        self._state = self._sampler.state_dict()

    def close(self) -> None:
        """Stop reading ahead."""
        if self._producer is not None:
            self._producer.close()
            self._producer = None
            # What was read ahead and not taken comes again.
            self._sampler.load_state_dict(self._state)

    def _steps(self, pool: ThreadPoolExecutor) -> Iterator[_Step]:
        for micro_batches in self._sampler:
            decoding: dict[Medium, Future[MediaTiles]] = {}
            loaded = [
                [[self._load(number, decoding, pool) for number in row] for row in rows] for rows in micro_batches
            ]
            yield _Step(micro_batches=loaded, state=self._sampler.state_dict())

    def _load(self, number: int, decoding: dict[Medium, Future[MediaTiles]], pool: ThreadPoolExecutor) -> _Loaded:
        stored = self._store[number]
        for medium, source in stored.media.items():
            if medium not in decoding:
                decoding[medium] = pool.submit(_decode, self._reader, medium, source, stored.sizes[medium])
        media = {medium: decoding[medium] for medium in stored.media}
        return _Loaded(number=number, stored=stored, encoded=self._encoder(stored.sample, stored.sizes), media=media)

    def _micro_batch(self, rows: Sequence[Sequence[_Loaded]]) -> MicroBatch:
        """Wait for the media of a micro-batch and leave out samples that lack one."""
        kept = [[one.encoded for one in row if self._is_readable(one)] for row in rows]
        return [row for row in kept if row] or [[self._idle]]

    def _is_readable(self, one: _Loaded) -> bool:
        try:
            tiles = {medium: future.result() for medium, future in one.media.items()}
        except DataError as e:  # anything else, such as a store that does not answer, is no fault of the sample
            self._bad.add(one.number, one.stored, str(e))
            return False
        self._tiles |= tiles
        return True


class BadMedia:
    """Counts samples whose media cannot be read and writes them down, once each, also over restarts.

    Args:
        directory: Folder of the stage's data; every process has a file of its own there.
        total: Records of the data set.
        known: How many of them were set aside when they were indexed.
        max_bad: Largest share that may be unusable.
        rank: This process.
    """

    def __init__(self, directory: Path, *, total: int, known: int, max_bad: float, rank: int = 0) -> None:
        self._path = directory / f"bad-media-{rank}.jsonl"
        self._total, self._known, self._max_bad = total, known, max_bad
        self._entries = {entry["sample"]: entry for entry in read_bad_media(directory)}

    @property
    def count(self) -> int:
        """Samples that this process knows of."""
        return len(self._entries)

    def add(self, number: int, stored: StoredSample, reason: str) -> None:
        """Note a sample.

        Raises:
            DataError: That was one too many.
        """
        if number in self._entries:
            return
        entry = {"sample": number, "where": stored.where, "id": stored.sample.id, "reason": reason}
        self._entries[number] = entry
        with self._path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(entry, ensure_ascii=False) + "\n")
        first = f"{stored.where}: {reason}"
        check_bad(self.count + self._known, self._total, self._max_bad, first, self._path)


def read_bad_media(directory: Path) -> list[dict[str, Any]]:
    """Return what processes noted, in the order of the data set and without repetitions."""
    entries: dict[int, dict[str, Any]] = {}
    for path in sorted(directory.glob("bad-media-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the process died while it wrote
                continue
            entries.setdefault(entry["sample"], entry)
    return [entries[number] for number in sorted(entries)]


class _Producer:
    """A thread that makes steps until it is closed; at most `ahead` of them wait to be taken."""

    def __init__(self, steps: Any, ahead: int, threads: int) -> None:
        self._queue: queue.Queue[_Step | BaseException] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._thread = threading.Thread(target=self._run, args=(steps,), name="feed", daemon=True)
        self._thread.start()

    def take(self) -> _Step:
        """Return the next step; what went wrong while it was made is raised here."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # the thread has ended; who asks again hears the same
            raise item
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, steps: Any) -> None:
        try:
            for step in steps(self._pool):
                if not self._put(step):
                    return
        except BaseException as e:  # raised again where the step is taken
            self._put(e)

    def _put(self, item: _Step | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_WAIT_S)
            except queue.Full:
                continue
            return True
        return False


def _decode(reader: MediaReader, medium: Medium, source: MediaSource, size: MediaSize) -> MediaTiles:
    kind, key = medium
    return reader.decode(kind, key, source.read(), size)
