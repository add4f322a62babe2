"""Downloading objects from S3: in ranges, several at once, hashed on the way.

A journal says which ranges are here, so a download goes on where a killed process stopped; the digest of the whole file
decides in the end.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.errors import ArtifactError
from nvila_platform.s3_client import s3_errors
from nvila_platform.s3_parts import MIB, Journal, Patience, Progress, TransferLimits, in_parallel

if TYPE_CHECKING:
    from minio import Minio

_READ_BYTES = MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """One object and the file it becomes.

    Args:
        name: Object.
        path: File; its folder is made.
        size_bytes: Size that it must have.
        sha256: Digest that it must have.
    """

    name: str
    path: Path
    size_bytes: int
    sha256: str


class Download:
    """One transfer of many objects.

    Args:
        client: A connected client.
        bucket: The bucket.
        journal: Where finished ranges are noted.
        limits: Sizes and patience.
        progress: Told about moved bytes.
    """

    def __init__(
        self, client: Minio, bucket: str, journal: Journal, limits: TransferLimits, progress: Progress
    ) -> None:
        self._client = client
        self._bucket = bucket
        self._journal = journal
        self._limits = limits
        self._progress = progress
        self._patience = Patience(limits.patience_s, progress.notice)

    def run(self, files: Sequence[Incoming]) -> None:
        """Make every object a file; returns when all are there and have their digests.

        Raises:
            ArtifactError: An object has another size or digest.
        """
        done: dict[str, set[tuple[int, int]]] = {}
        for line in self._journal.read():
            done.setdefault(str(line["object"]), set()).add((int(line["offset"]), int(line["length"])))
        tasks: list[Callable[[], object]] = []
        for file in files:
            tasks += self._ranges(file, done.get(file.name, set()))
        in_parallel(tasks, self._limits.parallel, self._patience.stop)

    def _ranges(self, file: Incoming, done: set[tuple[int, int]]) -> Iterator[Callable[[], object]]:
        """Yield the work that is left of a file; whoever brings the last range checks the digest."""
        file.path.parent.mkdir(parents=True, exist_ok=True)
        if not file.path.exists():
            done = set()
        with file.path.open("ab") as target:
            target.truncate(file.size_bytes)
        ranges = list(self._limits.ranges(file.size_bytes))
        here = {offset for offset, length in ranges if (offset, length) in done}
        state = _Arriving(file, ranges, here)
        left = [place for place in ranges if place[0] not in here]
        self._progress.add(file.size_bytes - sum(length for _, length in left))
        if not left:
            yield partial(self._finish, state)
        for offset, length in left:
            yield partial(self._range, state, offset, length)

    def _range(self, state: _Arriving, offset: int, length: int) -> None:
        if length:
            with s3_errors(f"s3://{self._bucket}/{state.file.name}"):
                self._patience.call(lambda: self._copy(state.file, offset, length))
        self._journal.add({"object": state.file.name, "offset": offset, "length": length})
        self._progress.add(length)
        if state.arrived(offset):
            self._finish(state)

    def _copy(self, file: Incoming, offset: int, length: int) -> None:
        answer = self._client.get_object(bucket_name=self._bucket, object_name=file.name, offset=offset, length=length)
        try:
            at = offset
            with file.path.open("r+b") as target:
                # What the socket has, as it is: `stream` gathers and copies first.
                while block := answer.read1(_READ_BYTES, decode_content=False):
                    at += os.pwrite(target.fileno(), block, at)
        finally:
            answer.close()
            answer.release_conn()
        if at != offset + length:
            raise ArtifactError(
                f"s3://{self._bucket}/{file.name}: ends at byte {at}, the manifest says {file.size_bytes} bytes",
                "discard the artifact and run the step again",
            )

    def _finish(self, state: _Arriving) -> None:
        if state.digest() == state.file.sha256:
            return
        if state.resumed:
            # What an earlier process left may be less than it noted: a power cut keeps the note and loses the bytes.
            for offset, length in state.ranges:
                self._patience.call(partial(self._copy, state.file, offset, length))
        found = _Arriving(state.file, state.ranges, {offset for offset, _ in state.ranges}).digest()
        if found != state.file.sha256:
            raise ArtifactError(
                f"s3://{self._bucket}/{state.file.name}: sha256 {found[:12]}, the manifest says "
                f"{state.file.sha256[:12]}",
                "discard the artifact and run the step again",
            )


@dataclass(slots=True)
class _Arriving:
    """A file that is partly here, hashed from its beginning as far as it is whole."""

    file: Incoming
    ranges: list[tuple[int, int]]
    here: set[int]
    resumed: bool = field(init=False)
    _hash: hashlib._Hash = field(init=False, default_factory=hashlib.sha256)
    _hashed: int = field(init=False, default=0)
    _hashing: threading.Lock = field(init=False, default_factory=threading.Lock)
    _noting: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.resumed = bool(self.here)
        self.here = set(self.here)

    def arrived(self, offset: int) -> bool:
        """Note a range, hash what can be hashed, and return whether this was the last one."""
        with self._noting:
            self.here.add(offset)
            last = len(self.here) == len(self.ranges)
        # One thread hashes, the others go on fetching.
        if not last and self._hashing.acquire(blocking=False):
            try:
                self._advance()
            finally:
                self._hashing.release()
        return last

    def digest(self) -> str:
        """Return the digest of the whole file."""
        with self._hashing:
            self._advance()
            return self._hash.hexdigest()

    def _advance(self) -> None:
        # One small piece of memory that stays in the processor's cache, instead of a new one for each range.
        block = memoryview(bytearray(min(_READ_BYTES, max(1, self.file.size_bytes))))
        with self.file.path.open("rb", buffering=0) as source:
            while self._hashed < len(self.ranges) and self.ranges[self._hashed][0] in self.here:
                offset, length = self.ranges[self._hashed]
                source.seek(offset)
                while length > 0 and (got := source.readinto(block[: min(length, len(block))])):
                    self._hash.update(block[:got])
                    length -= got
                self._hashed += 1
