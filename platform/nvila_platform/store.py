"""The artifact store: finished directories, found again by step and key or by digest.

Backends share one protocol and are chosen by the scheme of `Settings.store_uri`. The local one publishes in place, so
work on one machine is never copied.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from nvila.errors import ArtifactError, ConfigError, nearest
from nvila.progress import SILENT, Reporter
from nvila_platform.artifacts import MANIFEST_NAME, Manifest, read_manifest, storage_errors, utc_now, verify
from nvila_platform.settings import Settings

logger = logging.getLogger(__name__)

RESERVED_STEPS = frozenset({"content", "damaged", "digests"})

_STEP = re.compile(r"[a-z0-9][a-z0-9_-]*")
_KEY = re.compile(r"[0-9a-f]{16,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactRef:
    """Points at one finished directory."""

    step: str
    key: str
    digest: str
    uri: str

    def to_json(self) -> str:
        """Return the form that crosses process boundaries."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ArtifactRef:
        """Parse what `to_json` wrote.

        Raises:
            ArtifactError: The text is no artifact reference.
        """
        try:
            raw = json.loads(text)
            return cls(**{name: str(raw[name]) for name in ("step", "key", "digest", "uri")})
        except (ValueError, KeyError, TypeError) as e:
            raise ArtifactError(f"not an artifact reference: {text[:80]!r}", "pass what `to_json` wrote") from e


class ArtifactStore(Protocol):
    """Holds finished directories and the ones being worked on."""

    def work_dir(self, step: str, key: str) -> Path:
        """Return the local directory in which this work happens; what an earlier try left in it is kept."""

    def lock(self, step: str, key: str, reporter: Reporter = SILENT) -> AbstractContextManager[None]:
        """Hold the work directory alone on this machine; waits for another process and says so."""

    def lookup(self, step: str, key: str) -> ArtifactRef | None:
        """Return the finished artifact of this key, or None. Files are not verified here."""

    def publish(self, directory: Path, reporter: Reporter = SILENT) -> ArtifactRef:
        """Make a work directory with a manifest findable."""

    def fetch(self, ref: ArtifactRef, reporter: Reporter = SILENT) -> Path:
        """Return a local directory with the artifact, verified."""

    def manifest(self, ref: ArtifactRef) -> Manifest:
        """Return the artifact's manifest without fetching its files."""

    def find(self, digest: str) -> ArtifactRef | None:
        """Return the artifact with this digest, or None; of several the one that finished last."""

    def touch(self, ref: ArtifactRef) -> None:
        """Note that an artifact was reused now, so that it does not count as old."""

    def discard(self, ref: ArtifactRef, reason: str) -> None:
        """Move a damaged artifact aside, so that its key is free again; nothing is deleted."""


def open_store(settings: Settings) -> ArtifactStore:
    """Open the store that the settings name.

    Raises:
        ConfigError: The address cannot be used; the message names the setting.
    """
    uri = settings.store_uri
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if scheme not in _BACKENDS:
        raise ConfigError(
            f"NVILA_STORE_URI={uri!r} has the unknown scheme {scheme!r}",
            f"{nearest(scheme, filter(None, _BACKENDS))} A folder needs no scheme",
        )
    return _BACKENDS[scheme](settings)


def reuse(store: ArtifactStore, step: str, key: str, reporter: Reporter = SILENT) -> ArtifactRef | None:
    """Return the finished and sound artifact of this key, or None when the work has to be done.

    A damaged artifact is named in a notice and moved aside, so that the caller simply does the work again. Work that
    finished but was not published, because the process died in between, is published now.
    """
    try:
        ref = store.lookup(step, key)
        if ref is not None:
            store.fetch(ref, reporter)
            store.touch(ref)
            return ref
        directory = store.work_dir(step, key)
        return store.publish(directory, reporter) if read_manifest(directory) is not None else None
    except ArtifactError as e:
        reporter.notice(f"{step}: {e.message}; moved aside, doing it again")
        store.discard(ArtifactRef(step=step, key=key, digest="", uri=""), e.message)
        return None


class LocalStore:
    """A folder; directories are `<root>/<step>/<first 16 digits of the key>`.

    Args:
        root: Created when missing.

    Raises:
        ConfigError: The folder cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        with storage_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)

    def work_dir(self, step: str, key: str) -> Path:
        """Return the directory of this work, created when missing."""
        directory = self._directory(step, key)
        with storage_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        return directory

    def lock(self, step: str, key: str, reporter: Reporter = SILENT) -> AbstractContextManager[None]:
        """Hold the work directory alone; the operating system releases it when the process dies."""
        name = self._directory(step, key).name
        return file_lock(self.root / ".locks" / f"{step}-{name}", f"{step} {name}", reporter)

    def lookup(self, step: str, key: str) -> ArtifactRef | None:
        """Return the finished artifact of this key, or None.

        Raises:
            ArtifactError: The directory's manifest is broken or belongs to another key.
        """
        directory = self._directory(step, key)
        manifest = read_manifest(directory)
        if manifest is None:
            return None
        if (manifest.step, manifest.key) != (step, key):
            raise ArtifactError(
                f"{directory}: its manifest is of step '{manifest.step}', key {manifest.key[:16]}", "discard it"
            )
        return self._ref(directory, manifest)

    def publish(self, directory: Path, reporter: Reporter = SILENT) -> ArtifactRef:
        """Verify a finished work directory in place and return its reference.

        Raises:
            ArtifactError: The directory is unfinished, damaged, or not one of this store's work directories.
        """
        manifest = verify(directory)
        if directory.resolve() != self._directory(manifest.step, manifest.key).resolve():
            raise ArtifactError(
                f"{directory}: is not the store's directory of step '{manifest.step}'", "work in store.work_dir()"
            )
        return self._ref(directory, manifest)

    def fetch(self, ref: ArtifactRef, reporter: Reporter = SILENT) -> Path:
        """Return the artifact's directory, verified.

        Raises:
            ArtifactError: It is missing, damaged, or its digest is not the reference's.
        """
        directory = self._directory(ref.step, ref.key)
        manifest = verify(directory)
        check_digest(manifest, ref, str(directory))
        return directory

    def manifest(self, ref: ArtifactRef) -> Manifest:
        """Return the artifact's manifest.

        Raises:
            ArtifactError: It is missing or broken.
        """
        directory = self._directory(ref.step, ref.key)
        manifest = read_manifest(directory)
        if manifest is None:
            raise ArtifactError(f"{directory}: holds no finished artifact", "run the step again")
        return manifest

    def find(self, digest: str) -> ArtifactRef | None:
        """Return the artifact with this digest, or None; of several the one that finished last."""
        found = [(manifest.finished_at, path) for path, manifest in self._finished() if manifest.digest == digest]
        if not found:
            return None
        directory = max(found)[1]
        manifest = read_manifest(directory)
        return self._ref(directory, manifest) if manifest else None

    def touch(self, ref: ArtifactRef) -> None:
        """Set the time of the manifest."""
        with contextlib.suppress(OSError):
            os.utime(self._directory(ref.step, ref.key) / MANIFEST_NAME)

    def discard(self, ref: ArtifactRef, reason: str) -> None:
        """Move the artifact's directory to `<root>/damaged/`, with the reason beside its files."""
        directory = self._directory(ref.step, ref.key)
        set_aside(directory, self.root / "damaged" / f"{ref.step}-{directory.name}", reason)

    def _directory(self, step: str, key: str) -> Path:
        check_names(step, key)
        return self.root / step / key[:16]

    def _ref(self, directory: Path, manifest: Manifest) -> ArtifactRef:
        uri = directory.absolute().as_uri()
        return ArtifactRef(step=manifest.step, key=manifest.key, digest=manifest.digest, uri=uri)

    def _finished(self) -> Iterator[tuple[Path, Manifest]]:
        for step in sorted(self.root.iterdir()):
            if step.name in RESERVED_STEPS or not _STEP.fullmatch(step.name) or not step.is_dir():
                continue
            for directory in sorted(step.iterdir()):
                try:
                    manifest = read_manifest(directory)
                except ArtifactError as e:
                    logger.warning("%s", e.message)
                    continue
                if manifest is not None:
                    yield directory, manifest


def check_names(step: str, key: str) -> None:
    """Refuse names that would leave the store's layout.

    Raises:
        ArtifactError: The step or the key cannot name a directory of the store.
    """
    if not _STEP.fullmatch(step) or step in RESERVED_STEPS:
        raise ArtifactError(f"'{step}' cannot name a step", "use lower-case letters, digits, - and _")
    if not _KEY.fullmatch(key):
        raise ArtifactError(f"'{key}' is not a content key", "use content_key()")


def check_digest(manifest: Manifest, ref: ArtifactRef, where: str) -> None:
    """Refuse an artifact that is sound but not the one that was asked for.

    Raises:
        ArtifactError: The digests differ.
    """
    if manifest.digest != ref.digest:
        raise ArtifactError(
            f"{where}: digest {manifest.digest[:12]}, the reference says {ref.digest[:12]}",
            "the artifact was made again after the reference was taken; run the later steps again",
        )


def set_aside(directory: Path, target: Path, reason: str) -> None:
    """Move a directory to `target` plus the time; a missing one is nothing to do."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    aside = target.with_name(f"{target.name}-{stamp}")
    with storage_errors(aside):
        aside.parent.mkdir(parents=True, exist_ok=True)
        try:
            directory.rename(aside)
        except FileNotFoundError:
            return
        (aside / "DAMAGED.txt").write_text(f"{utc_now()} {reason}\n", encoding="utf-8")


@contextmanager
def file_lock(path: Path, what: str, reporter: Reporter = SILENT) -> Iterator[None]:
    """Hold an exclusive lock between processes of this machine.

    Args:
        path: The lock file; it stays when the lock is gone.
        what: Names the locked thing in the notice.
        reporter: Told when another process holds the lock.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            reporter.notice(f"{what}: process {holder} is working on it; waiting")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        # Unlocked by name, not only closed: a forked child may still hold a copy of the descriptor.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _open_folder(settings: Settings) -> ArtifactStore:
    uri = settings.store_uri
    return LocalStore(Path(unquote(urlsplit(uri).path) if "://" in uri else uri))


def _open_s3(settings: Settings) -> ArtifactStore:
    from nvila_platform.s3_store import S3Store

    return S3Store.open(settings)


_BACKENDS: dict[str, Callable[[Settings], ArtifactStore]] = {"": _open_folder, "file": _open_folder, "s3": _open_s3}
