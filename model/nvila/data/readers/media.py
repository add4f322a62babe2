"""Where the bytes of images and videos come from; nothing is read before somebody asks."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field

from nvila.data.media import ImageTable
from nvila.data.readers.locations import LOCAL, Location, reading
from nvila.data.readers.packages import package
from nvila.data.readers.problems import RecordError
from nvila.data.readers.record import MediaSource
from nvila.errors import DataError


@dataclass(frozen=True, slots=True)
class FileMedia:
    """A file of its own."""

    location: Location

    def read(self) -> bytes:
        """Return the whole file.

        Raises:
            DataError: It is missing or cannot be read; the message names it.
        """
        return self.location.read()


@dataclass(frozen=True, slots=True)
class BytesMedia:
    """Bytes that stood in the record itself."""

    data: bytes = field(repr=False)

    def read(self) -> bytes:
        """Return them."""
        return self.data


class TableFile:
    """An image table beside the samples, as every data directory of ours has one; read whole at the first image."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self._table: ImageTable | None = None

    @classmethod
    def beside(cls, location: Location, name: str) -> TableFile | None:
        """Return the image table in the folder of a file, if there is one."""
        table = location.parent.below(name)
        if not table.is_file():
            return None
        pq, pa = package("pyarrow.parquet"), package("pyarrow")
        try:
            with table.open() as file:
                columns = pq.read_schema(file).names
        except (OSError, pa.ArrowException) as e:
            raise DataError(f"{table.uri} is no Parquet file: {e}", "make the data directory again") from e
        return cls(table) if {"key", "bytes"} <= set(columns) else None

    def encoded(self, key: str) -> bytes:
        """Return the bytes under a key."""
        if self._table is None:
            with reading(self.location.uri), self.location.open() as file:
                self._table = ImageTable.open(file, where=self.location.uri)
        return self._table.encoded(key)


@dataclass(frozen=True, slots=True)
class TableMedia:
    """An image in an image table."""

    table: TableFile
    key: str

    def read(self) -> bytes:
        """Return its bytes.

        Raises:
            DataError: The table does not have it.
        """
        return self.table.encoded(self.key)


@dataclass(frozen=True, slots=True)
class MediaFolder:
    """Resolves the paths in records, and keeps them below one folder.

    Args:
        home: Folder of the data file.
        root: Folder that media must be in; relative paths start here.
        table: Image table that holds them instead.
    """

    home: Location
    root: Location
    table: TableFile | None = None

    def find(self, path: str) -> tuple[str, MediaSource]:
        """Return the key and the source of a medium.

        Raises:
            RecordError: The path is no path, or leads out of the folder.
        """
        if self.table is not None:
            return f"{self.table.location.uri}#{path}", TableMedia(self.table, path)
        file = self._resolve(path)
        return file.uri, FileMedia(file)

    def _resolve(self, path: str) -> Location:
        if "\0" in path:
            raise RecordError(f"media path {path!r} holds a null character")
        scheme, separator, rest = path.partition("://")
        if separator and scheme != self.root.scheme:
            raise RecordError(f"media path {path!r} is not below {self.root.uri}; download it there first")
        if separator:
            # What follows a scheme is absolute; a path of an object store has no leading slash.
            tries = [f"/{rest.lstrip('/')}" if self.root.scheme == LOCAL else rest]
        else:
            starts = [self.root] if self.home.scheme != self.root.scheme else [self.root, self.home]
            tries = [posixpath.join(start.path, path) for start in starts]
        for absolute in map(posixpath.normpath, tries):
            if absolute.startswith(f"{self.root.path.rstrip('/')}/"):
                return self.root.at(absolute)
        raise RecordError(f"media path {path!r} leads out of {self.root.uri}; set media_dir to a folder above it")
