"""Where data lies: local paths and object stores behind one file system interface."""

from __future__ import annotations

import gzip
import io
import lzma
import posixpath
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from nvila.data.readers.packages import package
from nvila.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# File systems by scheme, such as `{"s3": ...}`; local files need none.
FileSystems = Mapping[str, "AbstractFileSystem"]

LOCAL = "file"
_BUFFER_BYTES = 2**20
WILDCARDS = frozenset("*?[{")
# What decompressors raise where a file was cut short or damaged.
CUT_SHORT = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


@dataclass(frozen=True, slots=True)
class Location:
    """A file, folder or pattern on a file system.

    Args:
        fs: The file system.
        scheme: Its scheme; `file` for local files.
        path: Absolute path on it, without the scheme.
    """

    fs: AbstractFileSystem
    scheme: str
    path: str

    @property
    def uri(self) -> str:
        """The location as people write it: a plain path, or with the scheme in front."""
        return self.path if self.scheme == LOCAL else f"{self.scheme}://{self.path}"

    @property
    def parent(self) -> Location:
        """The folder that holds it."""
        return Location(self.fs, self.scheme, posixpath.dirname(self.path))

    def at(self, path: str) -> Location:
        """Return another path of the same file system."""
        return Location(self.fs, self.scheme, path)

    def below(self, name: str) -> Location:
        """Return a path below this folder."""
        return self.at(posixpath.join(self.path, name))

    def is_file(self) -> bool:
        """Whether a file is there."""
        with reading(self.uri):
            return bool(self.fs.isfile(self.path))

    def open(self) -> BinaryIO:
        """Open the file for reading; `.gz`, `.bz2` and `.xz` are decompressed on the way.

        Raises:
            DataError: It is missing or may not be read.
        """
        with reading(self.uri):
            file = self.fs.open(self.path, "rb", compression="infer")
        # Files of fsspec cannot read a line up to a length.
        return cast("BinaryIO", file if self.scheme == LOCAL else io.BufferedReader(file, _BUFFER_BYTES))

    def read(self) -> bytes:
        """Return the bytes of the file as they are.

        Raises:
            DataError: It is missing or may not be read.
        """
        with reading(self.uri):
            return bytes(self.fs.cat_file(self.path))


def locate(text: str, filesystems: FileSystems | None = None, base: Location | None = None) -> Location:
    """Find the file system of a location.

    Args:
        text: A path, `~` included, or `scheme://...`.
        filesystems: What there is besides local files.
        base: Folder that a relative path starts from; None is the working directory.

    Raises:
        ConfigError: The text is empty, or its scheme has no file system.
    """
    if not text.strip() or "\0" in text:
        raise ConfigError(f"{text!r} is no location", "give a file, a folder, a pattern or s3://bucket/prefix")
    scheme, separator, rest = text.partition("://")
    if not separator:
        path = Path(text).expanduser()
        if base is not None and not path.is_absolute():
            return base.at(posixpath.normpath(posixpath.join(base.path, text)))
        return _local(path)
    if scheme == LOCAL:
        return _local(Path(rest))
    known = filesystems or {}
    if scheme not in known:
        raise ConfigError(f"{text}: no file system for {scheme}://", nearest(scheme, [LOCAL, *known]))
    return Location(known[scheme], scheme, rest.strip("/"))


def expand(location: Location) -> list[Location]:
    """Return the files and folders that a location stands for, in the order of their names.

    Args:
        location: A path, or a pattern with `*`, `?`, `[...]` or `{a..b}`.

    Raises:
        DataError: Nothing is there.
    """
    with reading(location.uri):
        if location.fs.exists(location.path):
            return [location]
        # In the order of the braces, since that is the order of the shards.
        patterns = package("braceexpand").braceexpand(location.path) if "{" in location.path else [location.path]
        found = [path for pattern in patterns for path in _matches(location.fs, pattern)]
    if not found:
        raise DataError(f"{location.uri} does not exist", "check the path")
    return [location.at(path) for path in found]


def files_in(folder: Location) -> list[Location]:
    """Return the files directly in a folder, in the order of their names, without hidden ones."""
    with reading(folder.uri):
        entries = folder.fs.ls(folder.path, detail=True)
    return _shown(folder, [entry["name"] for entry in entries if entry["type"] == "file"])


def files_below(folder: Location) -> list[Location]:
    """Return the files in a folder and its subfolders, in the order of their paths, without hidden ones."""
    with reading(folder.uri):
        return _shown(folder, folder.fs.find(folder.path))


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what file systems raise into a `DataError` that names the file; errors of our own pass."""
    try:
        yield
    except FileNotFoundError as e:
        raise DataError(f"{where} does not exist", "check the path") from e
    except PermissionError as e:
        raise DataError(f"{where} may not be read", "check its permissions") from e
    except IsADirectoryError as e:
        raise DataError(f"{where} is a folder", "name a file") from e
    except (OSError, ValueError, *CUT_SHORT) as e:
        raise DataError(f"{where} cannot be read: {e}", "check the file") from e


def _local(path: Path) -> Location:
    fs = package("fsspec.implementations.local").LocalFileSystem()
    # Not resolved: a link is named as people named it.
    return Location(fs, LOCAL, posixpath.normpath(path.expanduser().absolute().as_posix()))


def _matches(fs: AbstractFileSystem, pattern: str) -> list[str]:
    """Return the paths that match, in order; one without wildcards is missed by whoever opens it, with its name."""
    if not WILDCARDS & set(pattern):
        return [pattern]
    return [path for path in sorted(fs.glob(pattern)) if "/." not in path]


def _shown(folder: Location, paths: Iterable[str]) -> list[Location]:
    """Leave out what is hidden or being written: the file itself, or a folder on the way to it."""

    def is_hidden(path: str) -> bool:
        return any(part.startswith((".", "_")) for part in posixpath.relpath(path, folder.path).split("/"))

    return [folder.at(path) for path in sorted(paths) if not is_hidden(path)]
