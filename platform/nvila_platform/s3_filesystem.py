"""Data on S3 for readers: objects as files that are read in ranges, through the `minio` SDK.

Read-only. A missing object is a `DataError` of whoever named it; a service that does not answer is an
`InfrastructureError`, after which the same command may pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

from nvila.errors import CapabilityError, DataError
from nvila_platform.s3_client import connect, s3_errors
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from minio import Minio
    from minio.datatypes import Object

Info = dict[str, Any]
_FIX = "check the path; was it deleted or replaced meanwhile?"


def data_filesystems(settings: Settings) -> dict[str, AbstractFileSystem]:
    """Return the file systems, by scheme, that data may lie on besides local files; connected when one is used."""
    return {"s3": S3FileSystem(settings)}


class S3FileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The buckets of one S3 service.

    Args:
        settings: Name the service and the identity.
    """

    protocol = "s3"
    cachable = False

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings
        self._connected: Minio | None = None

    def __reduce__(self) -> tuple[type[S3FileSystem], tuple[Settings]]:
        return type(self), (self._settings,)

    @property
    def client(self) -> Minio:
        """The connected client.

        Raises:
            ConfigError: A setting is missing.
        """
        if self._connected is None:
            self._connected = connect(self._settings, "data on s3://")
        return self._connected

    def info(self, path: str, **_: Any) -> Info:
        """Return name, type and, of an object, size and etag.

        Raises:
            FileNotFoundError: There is neither an object nor anything below this name.
            NvilaError: The bucket is missing, the identity is refused, or the service does not answer.
        """
        bucket, key = self._split(path)
        if key and (found := self._stat(bucket, key)) is not None:
            return found
        if next(self._list(bucket, f"{key}/" if key else ""), None) is None:
            raise FileNotFoundError(self._uri(path))
        return {"name": self._strip_protocol(path), "type": "directory", "size": 0}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """List what is directly below a name.

        Raises:
            FileNotFoundError: Nothing is.
        """
        bucket, key = self._split(path)
        found = sorted(self._list(bucket, f"{key}/" if key else ""), key=lambda entry: str(entry["name"]))
        found = found or [self.info(path)]
        return found if detail else [entry["name"] for entry in found]

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **_: Any
    ) -> Any:
        """List all objects below a name in one listing; `maxdepth` and `withdirs` walk."""
        if maxdepth is not None or withdirs:
            return super().find(path, maxdepth=maxdepth, withdirs=withdirs, detail=detail)
        bucket, key = self._split(path)
        found = {entry["name"]: entry for entry in self._list(bucket, f"{key}/" if key else "", recursive=True)}
        names = sorted(found)
        return {name: found[name] for name in names} if detail else names

    def exists(self, path: str, **_: Any) -> bool:
        """Whether anything has this name; a service that does not answer is an error, not a no."""
        return self._type(path) is not None

    def isfile(self, path: str) -> bool:
        """Whether an object has this name."""
        return self._type(path) == "file"

    def isdir(self, path: str) -> bool:
        """Whether objects are below this name."""
        return self._type(path) == "directory"

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Return the bytes of an object, or of a range of it.

        Raises:
            DataError: It is missing.
        """
        if (start or 0) < 0 or (end or 0) < 0:
            data: bytes = super().cat_file(path, start, end)
            return data
        return self._get(path, start or 0, end)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> S3File:
        if mode != "rb":
            raise CapabilityError(f"{self._uri(path)}: data on S3 is only read", "write results to the artifact store")
        return S3File(self, path, mode, **{name: value for name, value in options.items() if name in _BUFFERING})

    def _type(self, path: str) -> str | None:
        try:
            return str(self.info(path)["type"])
        except FileNotFoundError:
            return None

    def _get(self, path: str, start: int, end: int | None, etag: str | None = None) -> bytes:
        """Read bytes `start` to `end`; with an etag only of the object that had it."""
        if end is not None and end <= start:
            return b""
        bucket, key = self._split(path)
        with self._errors(path):
            response = self.client.get_object(
                bucket_name=bucket,
                object_name=key,
                offset=start,
                length=0 if end is None else end - start,
                request_headers={"If-Match": f'"{etag}"'} if etag else None,
            )
            try:
                return bytes(response.data)
            finally:
                response.close()
                response.release_conn()

    def _stat(self, bucket: str, key: str) -> Info | None:
        from minio.error import S3Error

        with self._errors(f"{bucket}/{key}"):
            try:
                return self._entry(self.client.stat_object(bucket_name=bucket, object_name=key))
            except S3Error as e:
                if e.code in ("NoSuchKey", "NoSuchObject"):
                    return None
                raise

    def _list(self, bucket: str, prefix: str, *, recursive: bool = False) -> Iterator[Info]:
        """Yield what is below a prefix; pages of the listing are fetched as they are needed."""
        with self._errors(f"{bucket}/{prefix}"):
            for item in self.client.list_objects(bucket_name=bucket, prefix=prefix, recursive=recursive):
                if item.object_name != prefix:  # the marker of a folder
                    yield self._entry(item)

    def _entry(self, item: Object) -> Info:
        name = f"{item.bucket_name}/{(item.object_name or '').rstrip('/')}"
        if item.is_dir:
            return {"name": name, "type": "directory", "size": 0}
        return {"name": name, "type": "file", "size": item.size or 0, "etag": item.etag}

    def _split(self, path: str) -> tuple[str, str]:
        bucket, _, key = str(self._strip_protocol(path)).partition("/")
        return bucket, key

    def _uri(self, path: str) -> str:
        return f"s3://{self._strip_protocol(path)}"

    def _errors(self, path: str) -> Any:
        return s3_errors(self._uri(path), missing=DataError, fix=_FIX)


class S3File(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """An object that is read in ranges. All of them are of one version: one that is replaced meanwhile is an error."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        filesystem: S3FileSystem = self.fs
        return filesystem._get(self.path, start, end, self.details.get("etag"))


_BUFFERING = ("block_size", "cache_type", "cache_options", "size")
