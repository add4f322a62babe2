"""The artifact store on S3: MinIO, SeaweedFS, AWS and the like, through the `minio` SDK.

Objects are `<prefix>/<step>/<key>/<file>`, the manifest last, so a crash in the middle of an upload leaves nothing that
can be found. `<prefix>/digests/<digest>/<step>/<key>` is an empty object that makes a digest findable; it is written
before the manifest, and one that points at nothing finished is ignored.
"""

from __future__ import annotations

import io
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from nvila.errors import ArtifactError, ConfigError
from nvila.progress import SILENT, Reporter
from nvila_platform.artifacts import (
    MANIFEST_NAME,
    Manifest,
    file_sha256,
    parse_manifest,
    storage_errors,
    verify,
    write_atomically,
)
from nvila_platform.s3_client import connect, s3_errors
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, LocalStore, check_digest, check_names, set_aside

if TYPE_CHECKING:
    from minio import Minio
    from minio.datatypes import Object

logger = logging.getLogger(__name__)


class S3Store:
    """Finished directories in a bucket, worked on and cached in a local folder.

    Args:
        client: A connected `minio.Minio`.
        bucket: An existing bucket.
        prefix: Put before every object name; may be empty.
        cache: Local folder for work directories and fetched artifacts, laid out as a `LocalStore`.
    """

    def __init__(self, client: Minio, bucket: str, prefix: str, cache: Path) -> None:
        self.client = client
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self.local = LocalStore(cache)

    @classmethod
    def open(cls, settings: Settings) -> S3Store:
        """Connect to the bucket that the settings name.

        Raises:
            ConfigError: A setting is missing, the credentials are refused, or there is no such bucket.
            InfrastructureError: The service cannot be reached.
        """
        parts = urlsplit(settings.store_uri)
        if not parts.netloc:
            raise ConfigError(f"NVILA_STORE_URI={settings.store_uri!r} names no bucket", "use s3://bucket/prefix")
        client = connect(settings, f"the store {settings.store_uri}")
        store = cls(client, parts.netloc, parts.path, settings.workspace / "artifacts")
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

    def publish(self, directory: Path) -> ArtifactRef:
        """Upload a finished directory, its manifest last.

        A key that is already published stays as it is and its reference is returned: everybody downstream sees the
        same bytes.

        Raises:
            ArtifactError: The directory is unfinished or damaged.
        """
        manifest = verify(directory)
        present = self.lookup(manifest.step, manifest.key)
        if present is not None:
            if present.digest != manifest.digest:
                logger.warning("%s was published before with other bytes; those are used", present.uri)
            return present
        base = self._base(manifest.step, manifest.key)
        with s3_errors(self._uri(base)):
            for entry in manifest.outputs:
                self._upload(f"{base}/{entry.path}", directory / entry.path)
            marker = self._name(f"digests/{manifest.digest}/{manifest.step}/{manifest.key}")
            self.client.put_object(bucket_name=self.bucket, object_name=marker, data=io.BytesIO(), length=0)
            self._upload(f"{base}/{MANIFEST_NAME}", directory / MANIFEST_NAME)
        return self._ref(manifest)

    def fetch(self, ref: ArtifactRef) -> Path:
        """Return a local directory with the artifact, downloaded unless a sound copy is here.

        Raises:
            ArtifactError: It is missing or damaged in the bucket, or its digest is not the reference's.
        """
        check_names(ref.step, ref.key)
        cached = self.local.root / ".fetched" / ref.digest[:32]
        for directory in (self.local.root / ref.step / ref.key[:16], cached):
            if _is_sound(directory, ref):
                return directory
        manifest = self.manifest(ref)
        check_digest(manifest, ref, ref.uri)
        set_aside(cached, self.local.root / "damaged" / f"{ref.step}-{ref.key[:16]}", "a cached copy was damaged")
        with storage_errors(cached):
            cached.parent.mkdir(parents=True, exist_ok=True)
            incoming = Path(tempfile.mkdtemp(dir=cached.parent, prefix=".incoming-"))
            try:
                self._download(manifest, incoming)
                _move_unless_present(incoming, cached)
            finally:
                shutil.rmtree(incoming, ignore_errors=True)
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

    def discard(self, ref: ArtifactRef, reason: str) -> None:
        """Move the objects to `<prefix>/damaged/` and the local copy to the cache's `damaged/`."""
        from minio.commonconfig import CopySource

        self.local.discard(ref, reason)
        base = self._base(ref.step, ref.key)
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        aside = self._name(f"damaged/{ref.step}-{ref.key[:16]}-{stamp}")
        with s3_errors(self._uri(base)):
            names = [item.object_name or "" for item in self._list(f"{base}/")]
            for name in names:
                target = f"{aside}/{name.removeprefix(f'{base}/')}"
                source = CopySource(bucket_name=self.bucket, object_name=name)
                self.client.copy_object(bucket_name=self.bucket, object_name=target, source=source)
            if names:
                text = reason.encode()
                note = f"{aside}/DAMAGED.txt"
                self.client.put_object(self.bucket, note, io.BytesIO(text), len(text))
            # The manifest goes first: from then on the key is free, whatever happens to the rest.
            for name in sorted(names, key=lambda name: name != f"{base}/{MANIFEST_NAME}"):
                self.client.remove_object(bucket_name=self.bucket, object_name=name)

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

    def _download(self, manifest: Manifest, directory: Path) -> None:
        base = self._base(manifest.step, manifest.key)
        for entry in manifest.outputs:
            name = f"{base}/{entry.path}"
            path = directory / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            with s3_errors(self._uri(name)):
                self.client.fget_object(bucket_name=self.bucket, object_name=name, file_path=str(path))
            found = file_sha256(path)
            if found != entry.sha256:
                raise ArtifactError(
                    f"{self._uri(name)}: sha256 {found[:12]}, the manifest says {entry.sha256[:12]}",
                    "discard the artifact and run the step again",
                )
        text = self._read(f"{base}/{MANIFEST_NAME}")
        write_atomically(directory / MANIFEST_NAME, text or "")

    def _upload(self, name: str, path: Path) -> None:
        self.client.fput_object(bucket_name=self.bucket, object_name=name, file_path=str(path))

    def _list(self, prefix: str) -> Iterator[Object]:
        yield from self.client.list_objects(bucket_name=self.bucket, prefix=prefix, recursive=True)

    def _base(self, step: str, key: str) -> str:
        check_names(step, key)
        return self._name(f"{step}/{key}")

    def _name(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _uri(self, name: str) -> str:
        return f"s3://{self.bucket}/{name}"

    def _ref(self, manifest: Manifest) -> ArtifactRef:
        uri = self._uri(self._base(manifest.step, manifest.key))
        return ArtifactRef(step=manifest.step, key=manifest.key, digest=manifest.digest, uri=uri)


def _is_sound(directory: Path, ref: ArtifactRef) -> bool:
    try:
        return verify(directory).digest == ref.digest
    except ArtifactError:
        return False


def _move_unless_present(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        # Another process fetched the same digest in the meantime; its verified copy serves as well.
        if not (target / MANIFEST_NAME).is_file():
            raise
