"""Following the logs of a job's pods into one file: no line lost, none twice, whatever the connection does.

The file itself says how far each pod's log was read: its lines carry the time that the kubelet gave them. So a process
that takes over after a kill goes on behind the last line. A stream that breaks is opened again from a second before the
newest line, and what comes a second time is left out.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol, Self, TextIO

from nvila.errors import CapabilityError, NvilaError
from nvila_platform.artifacts import storage_errors
from nvila_platform.cluster.errors import NotThereError
from nvila_platform.cluster.pods import Pod, has_ended, has_started, name_of

_LINE = re.compile(rb"(\S+) \[([-.a-z0-9]+)\] (.*)\n")
# How much of a file's end is read to find the newest lines of every pod.
_TAIL_BYTES = 8 * 2**20
# Standard output and error are copied by two hands, so times of neighbouring lines may be in the wrong order.
_OVERLAP = timedelta(seconds=1)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 10.0

Say = Callable[[str], None]


class LogStream(Protocol):
    """Lines of a pod's log with their times; the last one lacks its line break where the stream ended inside it."""

    def __iter__(self) -> Iterator[str]:
        """Yield lines as they come."""

    def stop(self) -> None:
        """End it, from any thread."""


class LogSource(Protocol):
    """Opens the log of a pod from a time on; see `ClusterClient.log`."""

    def __call__(self, pod: str, since: str | None) -> LogStream:
        """Open the stream."""


class PodLogs:
    """Writes the logs of pods to a file, each in a thread, for the time of a `with` block.

    Args:
        source: Opens a pod's log.
        path: Gets the lines, appended, as `TIME [POD] TEXT`.
        say: Told once when logs cannot be read.
        echo: Gets the lines without their times, too.
    """

    def __init__(self, source: LogSource, path: Path, say: Say, echo: TextIO | None = None) -> None:
        self._source = source
        self._say = say
        self._echo = echo
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._mute = False
        self._followers: dict[str, _Follower] = {}
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._seen = _newest_lines(path)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def look(self, pods: Sequence[Pod]) -> None:
        """Follow pods that have started; note those that have ended or are gone."""
        now = {name_of(pod): pod for pod in pods}
        for name, pod in now.items():
            if name not in self._followers and has_started(pod):
                seen = self._seen.get(name, ())
                self._followers[name] = _Follower(name, self._source, self._write, self._refused, self._stop, seen)
        for name, follower in self._followers.items():
            if name not in now or has_ended(now[name]):
                follower.ended.set()

    def drain(self, timeout_s: float) -> None:
        """Wait until the logs of pods that have ended are complete."""
        end = time.monotonic() + timeout_s
        for follower in self._followers.values():
            if follower.ended.is_set():
                follower.thread.join(max(0.0, end - time.monotonic()))

    def close(self) -> None:
        """Stop following."""
        self._stop.set()
        for follower in self._followers.values():
            follower.interrupt()
        for follower in self._followers.values():
            follower.thread.join(_LONGEST_WAIT_S)
        os.close(self._descriptor)

    def _write(self, pod: str, at: str, text: str) -> None:
        with self._lock:
            os.write(self._descriptor, f"{at} [{pod}] {text}\n".encode())
            if self._echo is not None:
                self._echo.write(f"[{pod}] {text}\n")
                self._echo.flush()

    def _refused(self, error: NvilaError) -> None:
        with self._lock:
            if not self._mute:
                self._say(f"no logs of the nodes here: {error.message}; the job goes on")
            self._mute = True


class _Follower:
    """Follows one pod to the end of its log."""

    def __init__(
        self,
        pod: str,
        source: LogSource,
        write: Callable[[str, str, str], None],
        refused: Callable[[NvilaError], None],
        stop: threading.Event,
        seen: Iterable[str],
    ) -> None:
        self.ended = threading.Event()
        self._pod, self._source, self._write, self._refused, self._stop = pod, source, write, refused, stop
        self._stream: LogStream | None = None
        self._recent: list[tuple[datetime, str]] = [(_time(line), line) for line in seen]
        self.thread = threading.Thread(target=self._work, name=f"log-{pod}", daemon=True)
        self.thread.start()

    def interrupt(self) -> None:
        """Wake the thread where it waits for a line."""
        if self._stream is not None:
            self._stream.stop()

    def _work(self) -> None:
        wait_s = _FIRST_WAIT_S
        while not self._stop.is_set():
            # Asked before: only then has a stream that ends had the container's last line in it.
            had_ended = self.ended.is_set()
            try:
                if self._read(had_ended):
                    wait_s = _FIRST_WAIT_S
                if had_ended:
                    return
            except CapabilityError as e:
                self._refused(e)
                return
            except NvilaError as e:
                if had_ended and (isinstance(e, NotThereError) or wait_s >= _LONGEST_WAIT_S):
                    return
            self._stop.wait(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _read(self, had_ended: bool) -> bool:
        """Read a stream to its end and say whether anything came."""
        newest = max((at for at, _ in self._recent), default=None)
        since = None if newest is None else (newest - _OVERLAP).strftime("%Y-%m-%dT%H:%M:%SZ")
        again = Counter(line for _, line in self._recent)
        came = False
        self._stream = self._source(self._pod, since)
        for raw in self._stream:
            if not raw.endswith("\n") and not had_ended:
                # Half a line: the rest of it is in the next stream, which repeats this half.
                break
            line = raw.rstrip("\n")
            if again[line] > 0:
                again[line] -= 1
                continue
            at, _, text = line.partition(" ")
            self._write(self._pod, at, text)
            self._remember(_time(line), line)
            came = True
        return came

    def _remember(self, at: datetime, line: str) -> None:
        self._recent.append((at, line))
        if len(self._recent) % 256 == 0:
            self._recent = _window(self._recent)


def _window(lines: Sequence[tuple[datetime, str]]) -> list[tuple[datetime, str]]:
    """Return what may come again after the stream was opened anew."""
    start = (max(at for at, _ in lines) - _OVERLAP).replace(microsecond=0) - _OVERLAP
    return [(at, line) for at, line in lines if at >= start]


def _time(line: str) -> datetime:
    text = line.partition(" ")[0]
    # Python reads at most microseconds; that is enough to tell what lies within a second.
    text = re.sub(r"(\.\d{1,6})\d*", r"\1", text)
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)


def _newest_lines(path: Path) -> dict[str, list[str]]:
    """Return the newest lines of every pod in a file; half a line that a killed process left at its end is cut off."""
    if not path.is_file():
        return {}
    with path.open("r+b") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - _TAIL_BYTES))
        tail = log.read()
        whole = tail.rfind(b"\n") + 1
        if (whole or size <= _TAIL_BYTES) and whole < len(tail):
            log.truncate(size - (len(tail) - whole))
    found: dict[str, list[tuple[datetime, str]]] = {}
    for at, pod, text in _LINE.findall(tail[:whole]):
        line = f"{at.decode()} {text.decode('utf-8', errors='replace')}"
        found.setdefault(pod.decode(), []).append((_time(line), line))
    return {pod: [line for _, line in _window(lines)] for pod, lines in found.items()}
