"""The artifact store on S3: MinIO, SeaweedFS, AWS and the like, through the `minio` SDK.

Files are `<prefix>/content/<digest>/<file>`, under the digest of the whole directory, so that two machines that publish
different bytes for one key never mix them. `<prefix>/<step>/<key>/manifest.json` makes them findable by key; it is
written last, so a crash in the middle of an upload leaves nothing that can be found. `<prefix>/digests/<digest>/<step>/
<key>` is an empty object that makes a digest findable; one that points at nothing finished is ignored.
"""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from nvila.errors import ArtifactError, ConfigError, InfrastructureError, NvilaError
from nvila.progress import SILENT, Reporter
from nvila_platform.artifacts import (
    MANIFEST_NAME,
    Manifest,
    finished_manifest,
    parse_manifest,
    storage_errors,
    verify,
    verify_file,
    write_atomically,
)
from nvila_platform.s3_client import connect, s3_errors
from nvila_platform.s3_download import Download, Incoming
from nvila_platform.s3_parts import Journal, Patience, Progress, TransferLimits
from nvila_platform.s3_upload import Outgoing, Upload
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, LocalStore, check_digest, check_names, file_lock, set_aside

if TYPE_CHECKING:
    from minio import Minio
    from minio.datatypes import Object

logger = logging.getLogger(__name__)

# Names with a dot are no outputs.
_UPLOAD_JOURNAL = ".upload.jsonl"
_DOWNLOAD_JOURNAL = ".download.jsonl"


class S3Store:
    """Finished directories in a bucket, worked on and cached in a local folder.

    Args:
        client: A connected `minio.Minio`.
        bucket: An existing bucket.
        prefix: Put before every object name; may be empty.
        cache: Local folder for work directories and fetched artifacts, laid out as a `LocalStore`.
        limits: How files travel.
    """

    def __init__(
        self, client: Minio, bucket: str, prefix: str, cache: Path, limits: TransferLimits | None = None
    ) -> None:
        self.client = client
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self.local = LocalStore(cache)
        self.limits = limits or TransferLimits()

    @classmethod
    def connect(cls, settings: Settings) -> S3Store:
        """Return the store that the settings name; nothing is sent yet.

        Raises:
            ConfigError: A setting is missing.
        """
        parts = urlsplit(settings.store_uri)
        if not parts.netloc:
            raise ConfigError(f"NVILA_STORE_URI={settings.store_uri!r} names no bucket", "use s3://bucket/prefix")
        client = connect(settings, f"the store {settings.store_uri}")
        return cls(client, parts.netloc, parts.path, settings.workspace / "artifacts")

    @classmethod
    def open(cls, settings: Settings) -> S3Store:
        """Connect to the bucket that the settings name.

        Raises:
            ConfigError: A setting is missing, the credentials are refused, or there is no such bucket.
            InfrastructureError: The service cannot be reached.
        """
        store = cls.connect(settings)
        with s3_errors(settings.store_uri):
            try:
                exists = store.client.bucket_exists(bucket_name=store.bucket)
            except ValueError as e:
                raise ConfigError(f"NVILA_STORE_URI={settings.store_uri!r}: {e}", "correct the bucket's name") from e
        if not exists:
            raise ConfigError(
                f"NVILA_STORE_URI={settings.store_uri!r}: no bucket '{store.bucket}' at {settings.s3_endpoint}",
                "create the bucket or correct the name",
            )
        return store

    def work_dir(self, step: str, key: str) -> Path:
        """Return the local directory of this work, created when missing."""
        return self.local.work_dir(step, key)

    def lock(self, step: str, key: str, reporter: Reporter = SILENT) -> AbstractContextManager[None]:
        """Hold the work directory alone on this machine; between machines the first to publish wins."""
        return self.local.lock(step, key, reporter)

    def lookup(self, step: str, key: str) -> ArtifactRef | None:
        """Return the published artifact of this key, or None.

        Raises:
            ArtifactError: Its manifest is broken or belongs to another key.
        """
        manifest = self._manifest(step, key)
        return self._ref(manifest) if manifest else None

    def publish(self, directory: Path, reporter: Reporter = SILENT) -> ArtifactRef:
        """Upload a finished directory, its manifest last; what an interrupted try has sent is not sent again.

        A key that is already published stays as it is and its reference is returned: everybody downstream sees the
        same bytes.

        Raises:
            ArtifactError: The directory is unfinished or damaged.
            InfrastructureError: The service did not answer for as long as the limits say.
            ResourceError: It has no space.
        """
        manifest = finished_manifest(directory)
        present = self.lookup(manifest.step, manifest.key)
        if present is not None:
            if present.digest != manifest.digest:
                logger.warning("%s was published before with other bytes; those are used", present.uri)
            return present
        base = self._content(manifest.digest)
        files = [
            Outgoing(name=f"{base}/{entry.path}", path=directory / entry.path, size_bytes=entry.size_bytes)
            for entry in manifest.outputs
        ]
        journal = Journal(directory / _UPLOAD_JOURNAL)
        progress = Progress(reporter, "upload", sum(file.size_bytes for file in files))
        with s3_errors(self._uri(base)):
            upload = Upload(self.client, self.bucket, journal, self.limits, progress)
            upload.run(files, checks=(partial(verify_file, directory, entry) for entry in manifest.outputs))
            self._patient(reporter, lambda: self._put(self._marker(manifest), b""))
            self._patient(reporter, lambda: self._put_manifest(manifest, directory))
        journal.delete()
        # Another machine may have published this key in the meantime; then its bytes are the ones that count.
        return self.lookup(manifest.step, manifest.key) or self._ref(manifest)

    def fetch(self, ref: ArtifactRef, reporter: Reporter = SILENT) -> Path:
        """Return a local directory with the artifact, downloaded unless a sound copy is here.

        Raises:
            ArtifactError: It is missing or damaged in the bucket, or its digest is not the reference's.
            InfrastructureError: The service did not answer for as long as the limits say.
        """
        check_names(ref.step, ref.key)
        cached = fetched_folder(self.local.root, ref.digest)
        for directory in (self.local.root / ref.step / ref.key[:16], cached):
            if _is_sound(directory, ref):
                return directory
        manifest = self.manifest(ref)
        check_digest(manifest, ref, ref.uri)
        with file_lock(self.local.root / ".locks" / f"fetch-{cached.name}", f"fetching {ref.step}", reporter):
            if not _is_sound(cached, ref):
                set_aside(cached, self.local.root / "damaged" / f"{ref.step}-{ref.key[:16]}", "a copy was damaged")
                self._download(manifest, cached, reporter)
        return cached

    def manifest(self, ref: ArtifactRef) -> Manifest:
        """Return the artifact's manifest.

        Raises:
            ArtifactError: It is missing or broken.
        """
        manifest = self._manifest(ref.step, ref.key)
        if manifest is None:
            where = self._uri(self._base(ref.step, ref.key))
            raise ArtifactError(f"{where}: holds no finished artifact", "run the step again")
        return manifest

    def find(self, digest: str) -> ArtifactRef | None:
        """Return the artifact with this digest, or None; of several the one that finished last."""
        prefix = self._name(f"digests/{digest}/")
        with s3_errors(self._uri(prefix)):
            names = [item.object_name or "" for item in self._list(prefix)]
        found: list[tuple[str, Manifest]] = []
        for step, _, key in (name.removeprefix(prefix).partition("/") for name in names):
            try:
                manifest = self._manifest(step, key)
            except ArtifactError as e:
                logger.warning("%s", e.message)
                continue
            if manifest is not None and manifest.digest == digest:
                found.append((manifest.finished_at, manifest))
        return self._ref(max(found, key=lambda item: item[0])[1]) if found else None

    def touch(self, ref: ArtifactRef) -> None:
        """Write the digest's marker again, which has the time; without the right to, nothing happens."""
        try:
            with s3_errors(ref.uri):
                self._put(self._name(f"digests/{ref.digest}/{ref.step}/{ref.key}"), b"")
        except NvilaError as e:
            logger.info("%s", e.message)

    def discard(self, ref: ArtifactRef, reason: str) -> None:
        """Move the objects to `<prefix>/damaged/` and the local copy to the cache's `damaged/`."""
        self.local.discard(ref, reason)
        base = self._base(ref.step, ref.key)
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        aside = self._name(f"damaged/{ref.step}-{ref.key[:16]}-{stamp}")
        with s3_errors(self._uri(base)):
            # The manifest goes first: from then on the key is free, whatever happens to the rest.
            moved = self._move(base, aside)
            for digest in {_digest_of(text) for text in moved if text}:
                self._move(self._content(digest), aside)
            if moved:
                self._put(f"{aside}/DAMAGED.txt", reason.encode())

    def _move(self, base: str, aside: str) -> list[str]:
        """Move all objects below a name; returns the texts of manifests among them."""
        from minio.commonconfig import CopySource

        texts = []
        for name in [item.object_name or "" for item in self._list(f"{base}/")]:
            if name == f"{base}/{MANIFEST_NAME}":
                texts.append(self._read(name) or "")
            target = f"{aside}/{name.removeprefix(f'{base}/')}"
            source = CopySource(bucket_name=self.bucket, object_name=name)
            self.client.copy_object(bucket_name=self.bucket, object_name=target, source=source)
            self.client.remove_object(bucket_name=self.bucket, object_name=name)
        return texts

    def _manifest(self, step: str, key: str) -> Manifest | None:
        name = f"{self._base(step, key)}/{MANIFEST_NAME}"
        text = self._read(name)
        if text is None:
            return None
        manifest = parse_manifest(text, where=self._uri(name))
        if (manifest.step, manifest.key) != (step, key):
            raise ArtifactError(
                f"{self._uri(name)}: is of step '{manifest.step}', key {manifest.key[:16]}", "discard it"
            )
        return manifest

    def _read(self, name: str) -> str | None:
        from minio.error import S3Error

        with s3_errors(self._uri(name)):
            try:
                response = self.client.get_object(bucket_name=self.bucket, object_name=name)
            except S3Error as e:
                if e.code == "NoSuchKey":
                    return None
                raise
            try:
                return response.data.decode("utf-8", errors="replace")
            finally:
                response.close()
                response.release_conn()

    def _download(self, manifest: Manifest, cached: Path, reporter: Reporter) -> None:
        """Bring a directory; one that was killed left its ranges and a journal of them, and the next goes on there."""
        base = self._content(manifest.digest)
        incoming = cached.with_name(f".incoming-{cached.name}")
        files = [
            Incoming(
                name=f"{base}/{entry.path}",
                path=incoming / entry.path,
                size_bytes=entry.size_bytes,
                sha256=entry.sha256,
            )
            for entry in manifest.outputs
        ]
        progress = Progress(reporter, "download", sum(file.size_bytes for file in files))
        journal = Journal(incoming / _DOWNLOAD_JOURNAL)
        with storage_errors(cached):
            incoming.mkdir(parents=True, exist_ok=True)
            try:
                with s3_errors(self._uri(base)):
                    Download(self.client, self.bucket, journal, self.limits, progress).run(files)
                    text = self._read(f"{self._base(manifest.step, manifest.key)}/{MANIFEST_NAME}")
            except InfrastructureError:
                raise  # what came so far stays for the next try
            except Exception:
                shutil.rmtree(incoming, ignore_errors=True)
                raise
            journal.delete()
            write_atomically(incoming / MANIFEST_NAME, text or "")
            incoming.rename(cached)

    def _put(self, name: str, data: bytes) -> None:
        self.client.put_object(bucket_name=self.bucket, object_name=name, data=io.BytesIO(data), length=len(data))

    def _put_manifest(self, manifest: Manifest, directory: Path) -> None:
        """Write the manifest unless there is one: of two machines that publish a key at once, the first wins."""
        from minio.error import S3Error

        name = f"{self._base(manifest.step, manifest.key)}/{MANIFEST_NAME}"
        data = (directory / MANIFEST_NAME).read_bytes()
        try:
            self.client._put_object(self.bucket, name, data, {"If-None-Match": "*"})
        except S3Error as e:
            if e.code != "PreconditionFailed":
                raise

    def _patient(self, reporter: Reporter, action: Callable[[], None]) -> None:
        Patience(self.limits.patience_s, reporter.notice).call(action)

    def _list(self, prefix: str) -> Iterator[Object]:
        yield from self.client.list_objects(bucket_name=self.bucket, prefix=prefix, recursive=True)

    def _content(self, digest: str) -> str:
        return self._name(f"content/{digest}")

    def _marker(self, manifest: Manifest) -> str:
        return self._name(f"digests/{manifest.digest}/{manifest.step}/{manifest.key}")

    def _base(self, step: str, key: str) -> str:
        check_names(step, key)
        return self._name(f"{step}/{key}")

    def _name(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _uri(self, name: str) -> str:
        return f"s3://{self.bucket}/{name}"

    def _ref(self, manifest: Manifest) -> ArtifactRef:
        uri = self._uri(self._content(manifest.digest))
        return ArtifactRef(step=manifest.step, key=manifest.key, digest=manifest.digest, uri=uri)


def fetched_folder(cache: Path, digest: str) -> Path:
    """Return where a cache keeps an artifact that was fetched."""
    return cache / ".fetched" / digest[:32]


def _is_sound(directory: Path, ref: ArtifactRef) -> bool:
    try:
        return verify(directory).digest == ref.digest
    except ArtifactError:
        return False


def _digest_of(text: str) -> str:
    """Return the digest of a manifest's outputs; of a broken one, a digest that nothing has."""
    try:
        return parse_manifest(text, where="").digest
    except ArtifactError:
        return "none"
