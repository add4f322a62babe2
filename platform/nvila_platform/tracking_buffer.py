"""Tracked events on their way out: the queue in memory and the file that keeps them through an outage."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

Kind = Literal["params", "metrics", "tags", "artifact", "dataset", "close"]
_BATCH_VALUES = 1000
# What may wait in memory for a server that is slow or silent; some megabytes.
_MAX_WAITING_VALUES = 50_000
_READ_BYTES = 1 << 20


def now_ms() -> int:
    """Return the time in milliseconds, the unit that MLflow stores."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """What is needed to create a run now or after an outage.

    `local_id` is written to the run as a tag, so that a replay finds the run that an interrupted attempt created.
    """

    name: str
    experiment: str
    parent: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    local_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    start_ms: int = field(default_factory=now_ms)
    # Orders runs that start within one millisecond.
    opened_ns: int = field(default_factory=time.time_ns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One call of the caller: several values of one kind at one time."""

    kind: Kind
    values: Mapping[str, str | float]
    step: int = 0
    time_ms: int = field(default_factory=now_ms)


def batches(events: Sequence[Event]) -> Iterator[list[Event]]:
    """Cut events into neighbours of one kind that together stay within one request.

    A single event with more values than that is a batch of its own.
    """
    batch: list[Event] = []
    size = 0
    for event in events:
        if batch and (event.kind != batch[0].kind or size + len(event.values) > _BATCH_VALUES):
            yield batch
            batch, size = [], 0
        batch.append(event)
        size += len(event.values)
    if batch:
        yield batch


class Outbox:
    """Queue between the caller and the tracking thread; an event leaves it only when it was delivered or written.

    Args:
        max_values: Values that may wait.
    """

    def __init__(self, max_values: int = _MAX_WAITING_VALUES) -> None:
        self._events: deque[Event] = deque()
        self._max_values = max_values
        self._values = 0
        self._changed = threading.Condition()
        self._finished = False
        self._abandoned = False

    def put(self, event: Event) -> bool:
        """Add an event; ignored after `finish`.

        Returns:
            False when too much waits already, so that the event has to go elsewhere.
        """
        with self._changed:
            if self._finished:
                return True
            if self._values >= self._max_values:
                return False
            self._append(event)
            return True

    def finish(self, last: Event) -> None:
        """Add an event, whatever waits, and declare that none will follow; the first call counts."""
        with self._changed:
            if not self._finished:
                self._append(last)
            self._finished = True
            self._changed.notify_all()

    def wait(self, gather_s: float, idle_s: float) -> bool:
        """Wait for events, then a little longer for company.

        Args:
            gather_s: How long a first event waits for others to share its request.
            idle_s: How long to wait for a first event.

        Returns:
            False once everything left and nothing can follow.
        """
        with self._changed:
            self._changed.wait_for(lambda: bool(self._events) or self._finished, idle_s)
            if self._events:
                self._changed.wait_for(lambda: self._values >= _BATCH_VALUES or self._finished, gather_s)
            return not self._abandoned and (bool(self._events) or not self._finished)

    def peek(self) -> list[Event]:
        """Return the waiting events, oldest first, without removing them."""
        with self._changed:
            return list(self._events)

    def drop(self, count: int) -> None:
        """Remove the oldest events after they were delivered."""
        with self._changed:
            for _ in range(min(count, len(self._events))):
                self._values -= len(self._events.popleft().values)

    def abandon(self) -> list[Event]:
        """Take everything from the tracking thread, which must not touch any event from now on."""
        with self._changed:
            self._finished = self._abandoned = True
            left = list(self._events)
            self._events.clear()
            self._values = 0
            return left

    def _append(self, event: Event) -> None:
        before = self._values
        self._events.append(event)
        self._values += len(event.values)
        # Only for the first event, and for a request's worth: every wake-up takes the interpreter from the caller.
        if len(self._events) == 1 or before < _BATCH_VALUES <= self._values:
            self._changed.notify_all()

    @property
    def waiting_values(self) -> int:
        """How many values wait."""
        return self._values

    @property
    def abandoned(self) -> bool:
        """Whether the caller took the events back."""
        return self._abandoned


class BufferFile:
    """JSON lines of one run: its description, then its events.

    The file is locked for as long as somebody writes or replays it, so that two processes never replay one outage.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._delivered = 0

    @classmethod
    def create(cls, folder: Path, spec: RunSpec) -> BufferFile:
        """Start the file of a run.

        Raises:
            OSError: When the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^A-Za-z0-9-]+", "-", spec.name)[:40]
        # The time comes first: a parent run is then replayed before its children.
        path = folder / f"{spec.opened_ns}-{slug}-{spec.local_id[:12]}.jsonl"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        buffer = cls(path, descriptor)
        buffer._write({"run": asdict(spec)})
        buffer._delivered = os.fstat(descriptor).st_size
        return buffer

    @classmethod
    def claim(cls, path: Path) -> BufferFile | None:
        """Open a file that another process left, or return None while somebody else has it."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if os.fstat(descriptor).st_nlink == 0:  # replayed and removed between our open and our lock
            os.close(descriptor)
            return None
        return cls(path, descriptor)

    def append(self, events: Sequence[Event]) -> None:
        """Write events, one line each.

        Raises:
            OSError: When the disk refuses.
        """
        for event in events:
            self._write(asdict(event))

    def read(self) -> tuple[RunSpec, list[Event]]:
        """Return the run and its events, leaving out lines that a crash cut short.

        Raises:
            ValueError: When the description of the run itself is unreadable.
        """
        data = self.path.read_bytes()
        lines = data.decode("utf-8", errors="replace").splitlines()
        try:
            spec = RunSpec(**json.loads(lines[0])["run"])
        except (IndexError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.path}: no readable run description") from error
        self._delivered = len(data)
        return spec, self._events(lines[1:])

    def read_next(self) -> list[Event]:
        """Return some events that were written since the last read, by this process."""
        with self.path.open("rb") as file:
            file.seek(self._delivered)
            data = file.read(_READ_BYTES)
            data += file.readline()
        self._delivered += len(data)
        return self._events(data.decode("utf-8", errors="replace").splitlines())

    @property
    def fully_read(self) -> bool:
        """Whether nothing was written since the last read."""
        return os.fstat(self._descriptor).st_size <= self._delivered

    def _events(self, lines: Sequence[str]) -> list[Event]:
        events = []
        for line in lines:
            try:
                events.append(Event(**json.loads(line)))
            except (TypeError, json.JSONDecodeError):
                logger.warning("%s: a line is cut short and was left out: %.40r", self.path, line)
        return events

    def remove(self) -> None:
        """Delete the file after its events were delivered."""
        self.path.unlink(missing_ok=True)
        self.close()

    def set_aside(self) -> Path:
        """Rename a file that can never be replayed, so that it is kept but not tried again."""
        kept = self.path.with_suffix(".rejected")
        self.path.replace(kept)
        self.close()
        return kept

    def close(self) -> None:
        """Release the file for a later replay."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, record: Mapping[str, object]) -> None:
        os.write(self._descriptor, (json.dumps(record) + "\n").encode())
