"""Media that requests name instead of sending them: `store:PATH`, below one folder or one S3 prefix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nvila.errors import ConfigError, DataError, NvilaError
from nvila_platform.serving.errors import ApiError

if TYPE_CHECKING:
    from nvila_platform.settings import Settings

SCHEME = "store:"
# No empty, hidden or upward steps, and nothing that means more than itself to a file system or a log.
_PATH = re.compile(r"(?!\.)[A-Za-z0-9_.+=@-]+(?:/(?!\.)[A-Za-z0-9_.+=@-]+)*\Z")
_LONGEST_PATH = 1024


class MediaStore(Protocol):
    """Reads media below one place."""

    def read(self, path: str, most: int) -> bytes:
        """Return a medium of at most `most` bytes, or raise an `ApiError`; blocks."""


def open_media_store(uri: str, settings: Settings) -> MediaStore:
    """Open a folder or `s3://bucket/prefix`.

    Raises:
        ConfigError: It does not exist, or settings for it are missing.
        CapabilityError: The SDK of S3 is not installed.
    """
    if uri.startswith("s3://"):
        return _BucketStore(uri, settings)
    if "://" in uri:
        raise ConfigError(f"media store '{uri}' is of an unknown kind", "use a folder or s3://bucket/prefix")
    root = Path(uri).resolve()
    if not root.is_dir():
        raise ConfigError(f"media store {root} is no folder", "use an existing folder or s3://bucket/prefix")
    return _FolderStore(root)


def read_reference(store: MediaStore | None, url: str, most: int) -> bytes:
    """Return the medium behind `store:PATH`; blocks.

    Raises:
        ApiError: There is no store, no such medium, or it is too large.
    """
    if store is None:
        raise ApiError(400, "media_forbidden", "this server has no media store; send the medium as a data: URI")
    path = url[len(SCHEME) :]
    if len(path) > _LONGEST_PATH or not _PATH.match(path):
        raise ApiError(400, "invalid_media_reference", "a reference reads store:folder/name.jpg, without '..'")
    return store.read(path, most)


class _FolderStore:
    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, path: str, most: int) -> bytes:
        # Resolved: a link inside that leads outside is not followed.
        file = (self._root / path).resolve()
        if not file.is_relative_to(self._root) or not file.is_file():
            raise _missing()
        try:
            with file.open("rb") as content:
                data = content.read(most + 1)
        except OSError as e:
            raise _missing() from e
        return _bounded(data, most)


class _BucketStore:
    def __init__(self, uri: str, settings: Settings) -> None:
        from nvila_platform.s3_client import connect

        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise ConfigError(f"media store '{uri}' has no bucket", "use s3://bucket/prefix")
        self._bucket, self._prefix = bucket, prefix.strip("/")
        self._client = connect(settings, "the media store")

    def read(self, path: str, most: int) -> bytes:
        from nvila_platform.s3_client import s3_errors

        name = f"{self._prefix}/{path}".lstrip("/")
        try:
            with s3_errors("the media store", missing=DataError):
                answer = self._client.get_object(bucket_name=self._bucket, object_name=name)
                try:
                    data = answer.read(most + 1)
                finally:
                    answer.close()
                    answer.release_conn()
        except DataError as e:
            raise _missing() from e
        except NvilaError as e:
            message = "the media store does not answer; try again, or send the medium as a data: URI"
            raise ApiError(503, "media_store_unavailable", message, retry_after_s=5) from e
        return _bounded(data, most)


def _bounded(data: bytes, most: int) -> bytes:
    if len(data) > most:
        raise ApiError(413, "media_too_large", f"the medium has over {most} bytes")
    return data


def _missing() -> ApiError:
    return ApiError(400, "media_not_found", "the media store has no such medium")
