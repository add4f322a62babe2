"""Where backups of unfinished training live: a folder, such as a mounted volume, or S3.

An entry is a folder of files under a name. A list of its files with sizes and digests is written last, so an entry
without it is not there, whatever a crash left of it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import unquote, urlsplit

from nvila.errors import ArtifactError, ConfigError
from nvila_platform.artifacts import file_sha256, storage_errors
from nvila_platform.s3_client import connect, s3_errors
from nvila_platform.settings import Settings

COMPLETE = "complete.json"
_FIX = "an older backup is tried; delete this one when it is not needed"


class BackupStore(Protocol):
    """Entries of one training run."""

    def names(self) -> list[str]:
        """Return the names of complete entries."""

    def put(self, name: str, files: Mapping[str, Path]) -> None:
        """Store files by their path inside the entry; an entry of that name is replaced."""

    def get(self, name: str, target: Path) -> None:
        """Write an entry's files, verified, into a folder that does not exist yet; it appears at once or not at all.

        Raises:
            ArtifactError: The entry is damaged.
        """

    def delete(self, name: str) -> None:
        """Remove an entry, or what a crash left of one."""


def open_backups(settings: Settings, run: str) -> BackupStore | None:
    """Open the place that `NVILA_CHECKPOINT_URI` names, or return None when it names none; nothing is sent yet.

    Args:
        settings: Where it is.
        run: What is trained; runs with another name never see these entries.

    Raises:
        ConfigError: The address cannot be used.
    """
    uri = settings.checkpoint_uri
    if not uri:
        return None
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        return FolderBackups(Path(unquote(parts.path) if parts.scheme else uri) / run)
    if parts.scheme != "s3" or not parts.netloc:
        raise ConfigError(f"NVILA_CHECKPOINT_URI={uri!r} is no place for backups", "use a folder or s3://bucket/prefix")
    return S3Backups(settings, parts.netloc, "/".join(filter(None, (parts.path.strip("/"), run))))


@dataclass(frozen=True, slots=True)
class FolderBackups:
    """Entries below a folder."""

    root: Path

    def names(self) -> list[str]:
        """Return the names of complete entries."""
        # Not `rglob`, which breaks off when another process deletes what it is about to look into.
        found = (Path(folder) for folder, _, files in os.walk(self.root) if COMPLETE in files)
        return sorted(path.relative_to(self.root).as_posix() for path in found if path.suffix != ".partial")

    def put(self, name: str, files: Mapping[str, Path]) -> None:
        """Copy files, and rename the folder when all are there."""
        partial = self.root / f"{name}.partial"
        with storage_errors(partial):
            shutil.rmtree(partial, ignore_errors=True)
            for path, source in files.items():
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, partial / path)
            partial.mkdir(parents=True, exist_ok=True)
            (partial / COMPLETE).write_text(_listing(files), encoding="utf-8")
            self.delete(name)
            partial.rename(self.root / name)

    def get(self, name: str, target: Path) -> None:
        """Copy an entry back."""
        entry = self.root / name
        listed = _parse((entry / COMPLETE).read_bytes(), str(entry))
        _assemble(target, listed, str(entry), lambda path, to: shutil.copyfile(entry / path, to))

    def delete(self, name: str) -> None:
        """Remove an entry."""
        (self.root / name / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(self.root / name, ignore_errors=True)


class S3Backups:
    """Entries below a prefix of a bucket.

    Args:
        settings: Name the service and the identity.
        bucket: An existing bucket.
        prefix: Put before every object.
    """

    def __init__(self, settings: Settings, bucket: str, prefix: str) -> None:
        self._client = connect(settings, f"NVILA_CHECKPOINT_URI={settings.checkpoint_uri}")
        self._bucket = bucket
        self._prefix = prefix

    def names(self) -> list[str]:
        """Return the names of complete entries."""
        start = f"{self._prefix}/"
        found = (name.removeprefix(start).removesuffix(f"/{COMPLETE}") for name in self._objects(start, f"/{COMPLETE}"))
        return sorted(found)

    def put(self, name: str, files: Mapping[str, Path]) -> None:
        """Upload files, and the list of them at the end."""
        base, listing = f"{self._prefix}/{name}", _listing(files).encode()
        with s3_errors(f"s3://{self._bucket}/{base}"):
            self._client.remove_object(bucket_name=self._bucket, object_name=f"{base}/{COMPLETE}")
            for path, source in files.items():
                self._client.fput_object(bucket_name=self._bucket, object_name=f"{base}/{path}", file_path=str(source))
            self._client.put_object(self._bucket, f"{base}/{COMPLETE}", io.BytesIO(listing), len(listing))

    def get(self, name: str, target: Path) -> None:
        """Download an entry."""
        base = f"{self._prefix}/{name}"
        where = f"s3://{self._bucket}/{base}"

        def download(path: str, to: Path) -> None:
            with s3_errors(where, fix=_FIX):
                self._client.fget_object(self._bucket, f"{base}/{path}", str(to))

        with s3_errors(where, fix=_FIX):
            answer = self._client.get_object(bucket_name=self._bucket, object_name=f"{base}/{COMPLETE}")
            try:
                listed = _parse(answer.data, where)
            finally:
                answer.close()
                answer.release_conn()
        _assemble(target, listed, where, download)

    def delete(self, name: str) -> None:
        """Remove an entry, its list first."""
        base = f"{self._prefix}/{name}/"
        with s3_errors(f"s3://{self._bucket}/{base}"):
            for found in sorted(self._objects(base), key=lambda name: not name.endswith(f"/{COMPLETE}")):
                self._client.remove_object(bucket_name=self._bucket, object_name=found)

    def _objects(self, prefix: str, ending: str = "") -> list[str]:
        with s3_errors(f"s3://{self._bucket}/{prefix}"):
            listed = self._client.list_objects(bucket_name=self._bucket, prefix=prefix, recursive=True)
            names = [item.object_name or "" for item in listed]
        return [name for name in names if name.endswith(ending)]


def _listing(files: Mapping[str, Path]) -> str:
    return json.dumps({path: [source.stat().st_size, file_sha256(source)] for path, source in files.items()})


def _parse(data: bytes, where: str) -> dict[str, tuple[int, str]]:
    try:
        listed = {str(path): (int(size), str(sha256)) for path, (size, sha256) in json.loads(data).items()}
    except (ValueError, TypeError, AttributeError) as e:
        raise ArtifactError(f"{where}/{COMPLETE} is damaged: {e}", _FIX) from e
    for path in map(PurePosixPath, listed):
        if path.is_absolute() or ".." in path.parts:
            raise ArtifactError(f"{where}/{COMPLETE}: {str(path)!r} leaves the folder", _FIX)
    return listed


def _assemble(target: Path, listed: Mapping[str, tuple[int, str]], where: str, fetch: _Fetch) -> None:
    """Fetch files beside the target and rename the folder when all of them are sound."""
    partial = target.with_name(f".{target.name}.fetching")
    shutil.rmtree(partial, ignore_errors=True)
    with storage_errors(partial):
        partial.mkdir(parents=True)
    try:
        for path, (size, sha256) in listed.items():
            to = partial / path
            to.parent.mkdir(parents=True, exist_ok=True)
            try:
                fetch(path, to)
            except FileNotFoundError as e:
                raise ArtifactError(f"{where}/{path} is missing", _FIX) from e
            if to.stat().st_size != size or file_sha256(to) != sha256:
                raise ArtifactError(f"{where}/{path} is damaged", _FIX)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Fetch(Protocol):
    def __call__(self, path: str, to: Path, /) -> object: ...
