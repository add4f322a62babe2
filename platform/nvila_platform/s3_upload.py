"""Uploading files to S3: in parts, several at once, going on where a killed process stopped.

A journal beside the files says which parts the service has taken; what it says is compared with the service's own list
of parts, so that neither a lost journal nor a service that lost data leads to a wrong object.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nvila_platform.s3_parts import Journal, Patience, Progress, TransferLimits, in_parallel

if TYPE_CHECKING:
    from minio import Minio
    from minio.datatypes import Part

_LOST_UPLOAD = frozenset({"NoSuchUpload", "NoSuchKey", "InvalidArgument"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """One file and the object it becomes.

    Args:
        name: Object. A name must never be used for other bytes: resuming relies on it.
        path: File.
        size_bytes: Its size.
    """

    name: str
    path: Path
    size_bytes: int


class Upload:
    """One transfer of many files.

    Args:
        client: A connected client.
        bucket: An existing bucket.
        journal: Where finished parts are noted.
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

    def run(self, files: Sequence[Outgoing], checks: Iterable[Callable[[], object]] = ()) -> None:
        """Make every file an object; returns when all are there.

        Args:
            files: What is sent.
            checks: Run beside the transfer; an error of one ends it.
        """
        known = _Known(self._journal)
        large = [file for file in files if file.size_bytes > self._limits.part_size(file.size_bytes)]
        small = [file for file in files if file not in large]
        tasks: list[Callable[[], object]] = [*checks]
        tasks += [partial(self._whole, file, known.whole.get(file.name)) for file in small]
        for file in large:
            tasks += self._parts(file, known)
        in_parallel(tasks, self._limits.parallel, self._patience.stop)

    def _whole(self, file: Outgoing, etag: str | None) -> None:
        if etag is None or not self._is_there(file, etag):
            data = file.path.read_bytes()
            made = self._patience.call(lambda: self._client._put_object(self._bucket, file.name, data))
            self._journal.add({"object": file.name, "etag": made.etag})
        self._progress.add(file.size_bytes)

    def _parts(self, file: Outgoing, known: _Known) -> Iterator[Callable[[], object]]:
        """Yield the work that is left of a large file; its last part makes the object."""
        if (etag := known.whole.get(file.name)) is not None and self._is_there(file, etag):
            self._progress.add(file.size_bytes)
            return
        upload, taken = self._resumed(file, known)
        ranges = list(enumerate(self._limits.ranges(file.size_bytes), 1))
        assembly = _Assembly(upload, taken, len(ranges))
        left = [(number, place) for number, place in ranges if number not in taken]
        self._progress.add(file.size_bytes - sum(length for _, (_, length) in left))
        if not left:
            yield partial(self._complete, file, assembly)
        for number, (offset, length) in left:
            yield partial(self._part, file, assembly, number, offset, length)

    def _resumed(self, file: Outgoing, known: _Known) -> tuple[str, dict[int, str]]:
        """Return the multipart upload of a file and the parts that the service has of it."""
        from minio.error import S3Error

        upload = known.uploads.get(file.name)
        if upload is not None:
            noted = known.parts.get(upload, {})
            lengths = dict(enumerate((length for _, length in self._limits.ranges(file.size_bytes)), 1))
            try:
                stored = list(self._patience.call(lambda: list(self._stored(file, upload))))
            except S3Error as e:
                if e.code not in _LOST_UPLOAD:
                    raise
                stored = []
            taken = {
                part.part_number: part.etag
                for part in stored
                if part.etag == noted.get(part.part_number) and part.size == lengths.get(part.part_number)
            }
            if taken:
                return upload, taken
        made = self._patience.call(lambda: self._client._create_multipart_upload(self._bucket, file.name, {}))
        self._journal.add({"object": file.name, "upload": made})
        return made, {}

    def _stored(self, file: Outgoing, upload: str) -> Iterator[Part]:
        marker: str | None = None
        while True:
            page = self._client._list_parts(self._bucket, file.name, upload, part_number_marker=marker)
            yield from page.parts
            marker = page.next_part_number_marker
            if not page.is_truncated or not marker:
                return

    def _part(self, file: Outgoing, assembly: _Assembly, number: int, offset: int, length: int) -> None:
        with file.path.open("rb") as source:
            data = os.pread(source.fileno(), length, offset)
        etag = self._patience.call(
            lambda: self._client._upload_part(self._bucket, file.name, data, None, assembly.upload, number)
        )
        self._journal.add({"upload": assembly.upload, "part": number, "etag": etag})
        self._progress.add(length)
        if assembly.add(number, etag):
            self._complete(file, assembly)

    def _complete(self, file: Outgoing, assembly: _Assembly) -> None:
        from minio.datatypes import Part

        parts = [Part(number, etag) for number, etag in sorted(assembly.parts.items())]

        def make() -> str:
            made = self._client._complete_multipart_upload(self._bucket, file.name, assembly.upload, parts)
            return made.etag or ""

        self._journal.add({"object": file.name, "etag": self._patience.call(make)})

    def _is_there(self, file: Outgoing, etag: str) -> bool:
        from minio.error import S3Error

        try:
            found = self._patience.call(
                lambda: self._client.stat_object(bucket_name=self._bucket, object_name=file.name)
            )
        except S3Error as e:
            if e.code != "NoSuchKey":
                raise
            return False
        return (found.etag or "").strip('"') == etag.strip('"') and found.size == file.size_bytes


class _Known:
    """What the journal of an earlier try says."""

    def __init__(self, journal: Journal) -> None:
        self.whole: dict[str, str] = {}
        self.uploads: dict[str, str] = {}
        self.parts: dict[str, dict[int, str]] = {}
        for line in journal.read():
            if "part" in line:
                self.parts.setdefault(str(line["upload"]), {})[int(line["part"])] = str(line["etag"])
            elif "upload" in line:
                self.uploads[str(line["object"])] = str(line["upload"])
            elif "etag" in line:
                self.whole[str(line["object"])] = str(line["etag"])


class _Assembly:
    """Counts the parts of one object; exactly one caller learns that it added the last."""

    def __init__(self, upload: str, parts: dict[int, str], total: int) -> None:
        self.upload = upload
        self.parts = dict(parts)
        self._total = total
        self._lock = threading.Lock()

    def add(self, number: int, etag: str) -> bool:
        """Note a part; returns whether all are there now."""
        with self._lock:
            self.parts[number] = etag
            return len(self.parts) == self._total
