"""What is in a store that is a folder, for `garbage`."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from nvila.errors import ArtifactError
from nvila_platform.artifacts import MANIFEST_NAME, Manifest, read_manifest, storage_errors
from nvila_platform.garbage import Kind, Stored
from nvila_platform.store import RESERVED_STEPS, LocalStore


class FolderInventory:
    """Directories of a `LocalStore`; also the working folder of a store on S3.

    Args:
        store: The store.
    """

    def __init__(self, store: LocalStore) -> None:
        self._root = store.root

    def stored(self) -> Iterator[Stored]:
        """Yield every directory: work, finished or not, what was set aside, and fetched copies."""
        for directory in self._work():
            manifest = _manifest(directory)
            kind: Kind = "unfinished" if manifest is None else "artifact"
            yield _stored(directory, kind, "" if manifest is None else manifest.digest)
        for folder, kind in (("damaged", "damaged"), (".fetched", "copy")):
            for directory in _folders(self._root / folder):
                yield _stored(directory, "damaged" if kind == "damaged" else "copy")

    def inputs(self, digest: str) -> Mapping[str, str]:
        """Return digests of what an artifact was made of, by name."""
        return self._inputs.get(digest, {})

    def remove(self, one: Stored, before: datetime) -> bool:
        """Remove a directory that nobody works in; a crash in the middle leaves an unfinished one."""
        directory = Path(one.name)
        lock = self._root / ".locks" / f"{directory.parent.name}-{directory.name}"
        if _is_held(lock) or (directory.exists() and _used_at(directory) >= before):
            return False
        with storage_errors(directory):
            (directory / MANIFEST_NAME).unlink(missing_ok=True)
            shutil.rmtree(directory, ignore_errors=True)
        return not directory.exists()

    @cached_property
    def _inputs(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for directory in self._work():
            if (manifest := _manifest(directory)) is not None:
                # Equal bytes may have been made of different things; all of them count.
                label = f"{directory.name}/"
                found.setdefault(manifest.digest, {}).update(
                    {label + name: value for name, value in manifest.inputs.items()}
                )
        return found

    def _work(self) -> Iterator[Path]:
        for step in _folders(self._root):
            if step.name not in RESERVED_STEPS and not step.name.startswith("."):
                yield from _folders(step)


def _stored(directory: Path, kind: Kind, digest: str = "") -> Stored:
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    return Stored(kind=kind, name=str(directory), digest=digest, size_bytes=size, used_at=_used_at(directory))


def _used_at(directory: Path) -> datetime:
    """Return when something in a directory was written, or its manifest was touched by a reuse, last."""
    times = [path.lstat().st_mtime for path in (directory, *directory.rglob("*"))]
    return datetime.fromtimestamp(max(times), UTC)


def _manifest(directory: Path) -> Manifest | None:
    try:
        return read_manifest(directory)
    except ArtifactError:
        return None


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.is_symlink())
    except FileNotFoundError:
        return []


def _is_held(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
