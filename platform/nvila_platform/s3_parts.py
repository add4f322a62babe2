"""What uploads and downloads share: limits, a journal of finished parts, patience with a service, parallel work."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nvila.progress import Reporter

logger = logging.getLogger(__name__)

T = TypeVar("T")

MIB = 1 << 20
_MAX_PARTS = 10_000  # of one object; S3's own limit
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 10.0
_REPORT_EVERY_S = 1.0
_TRANSIENT = frozenset({"InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "OperationAborted"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferLimits:
    """How files travel.

    Args:
        part_bytes: Larger files travel in parts of this size, each of which can fail and resume alone.
        parallel: Parts that travel at once.
        patience_s: How long one part waits for a service that is away or overloaded before the transfer fails.
    """

    part_bytes: int = 8 * MIB
    parallel: int = 6
    patience_s: float = 120.0

    def part_size(self, size_bytes: int) -> int:
        """Return the part size for a file of this size, larger where S3 would need too many parts."""
        return max(self.part_bytes, -(-size_bytes // _MAX_PARTS))

    def ranges(self, size_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield offset and length of every part; an empty file has one empty part."""
        step = self.part_size(size_bytes)
        for offset in range(0, max(size_bytes, 1), step):
            yield offset, min(step, size_bytes - offset)


class Journal:
    """Lines of JSON about finished parts, which outlive the process.

    A line that a crash cut off is ignored, and so is all behind it.

    Args:
        path: The file; made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def read(self) -> list[dict[str, Any]]:
        """Return all whole lines."""
        found: list[dict[str, Any]] = []
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return found
        for line in text.splitlines():
            try:
                found.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                break
        self._rewrite(found)
        return found

    def add(self, line: dict[str, Any]) -> None:
        """Append a line."""
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def delete(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        # Without the cut-off line, behind which nothing could be appended.
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        temporary.replace(self._path)


class Progress:
    """Reports moved bytes in MiB, at most once a second.

    Args:
        reporter: Told.
        phase: `upload` or `download`.
        total_bytes: Of the whole transfer.
    """

    def __init__(self, reporter: Reporter, phase: str, total_bytes: int) -> None:
        self._reporter, self._phase, self._total = reporter, phase, total_bytes
        self._done = 0
        self._reported_at = time.monotonic()
        self._lock = threading.Lock()

    def add(self, moved_bytes: int) -> None:
        """Count bytes that are there now."""
        with self._lock:
            self._done += moved_bytes
            now = time.monotonic()
            if now - self._reported_at < _REPORT_EVERY_S:
                return
            self._reported_at = now
            self._reporter.progress(self._phase, self._done // MIB, max(1, self._total // MIB))

    def notice(self, text: str) -> None:
        """Tell the user a line."""
        with self._lock:
            self._reporter.notice(text)


class Patience:
    """Repeats what a service could not do just now.

    Args:
        limit_s: For how long.
        notice: Told once when waiting begins.
    """

    def __init__(self, limit_s: float, notice: Callable[[str], None]) -> None:
        self._limit_s = limit_s
        self._notice = notice
        self._said = False
        self.stop = threading.Event()

    def call(self, action: Callable[[], T]) -> T:
        """Return what the action returns; its last error comes out when patience ends or another part failed."""
        deadline, wait_s = time.monotonic() + self._limit_s, _FIRST_WAIT_S
        while True:
            try:
                return action()
            except Exception as e:
                if not is_transient(e) or time.monotonic() + wait_s > deadline:
                    raise
                if not self._said:
                    self._said = True
                    self._notice(f"the S3 service does not answer ({type(e).__name__}); trying for {self._limit_s:g} s")
                logger.info("S3: %s; again in %.1f s", e, wait_s)
                if self.stop.wait(wait_s):
                    raise
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


def is_transient(error: Exception) -> bool:
    """Whether the same request may pass in a moment."""
    from minio.error import InvalidResponseError, S3Error, ServerError
    from urllib3.exceptions import HTTPError

    if isinstance(error, S3Error):
        return error.code in _TRANSIENT
    if isinstance(error, ServerError):
        return error.status_code >= 500
    return isinstance(error, HTTPError | InvalidResponseError | ConnectionError)


def in_parallel(tasks: Iterable[Callable[[], object]], workers: int, stop: threading.Event) -> None:
    """Run tasks in threads; the first error ends the others as soon as they look at `stop`."""
    with ThreadPoolExecutor(workers, thread_name_prefix="s3") as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
