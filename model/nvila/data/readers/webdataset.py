"""WebDataset shards: tar files in which the members with one name before the first dot are one record.

Images and videos are taken in their order, `json` gives fields, `txt` and the like a caption, `cls` a class as text.
A `sizes.json` beside the shards, `{"shard-000.tar": 1000}`, says how many records each has, so that whole shards can be
skipped.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any, BinaryIO, Self

from nvila.data.readers.locations import CUT_SHORT, Location, reading
from nvila.data.readers.packages import package
from nvila.data.readers.problems import RecordError, kind_of
from nvila.data.readers.rows import DataFile, Format, Row, Rows
from nvila.data.readers.shapes import MediaKind
from nvila.errors import DataError

SIZES_FILE = "sizes.json"
MEDIA: dict[str, MediaKind] = {
    **dict.fromkeys(("avif", "bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp"), "image"),
    **dict.fromkeys(("avi", "mkv", "mov", "mp4", "webm"), "video"),
}
CAPTIONS = ("txt", "text", "caption", "cap", "cls")


class WebDataset(Format):
    """The format `webdataset`."""

    name = "webdataset"
    suffixes = (".tar", ".tar.gz", ".tgz")

    def __init__(self) -> None:
        self._sizes: dict[str, Mapping[str, int]] = {}  # by folder

    def open(self, file: DataFile, fields: Collection[str]) -> Rows:
        """Open a shard."""
        return _TarRows(file.location, self.count(file))

    def count(self, file: DataFile) -> int | None:
        """What `sizes.json` says."""
        folder = file.location.parent
        if folder.path not in self._sizes:
            self._sizes[folder.path] = _sizes(folder.below(SIZES_FILE))
        return self._sizes[folder.path].get(posixpath.basename(file.location.path))


class _TarRows(Rows):
    def __init__(self, location: Location, count: int | None) -> None:
        self.count = count
        self._members = _Members(location)
        self._groups = self._members.grouped()
        self._seen = 0
        self._ended = False

    def __next__(self) -> Row:
        if self._ended:
            raise StopIteration
        group = next(self._groups, None)
        if group is None:
            self._ended = True
            return self._last()
        self._seen += 1
        if self.count is not None and self._seen > self.count:
            raise DataError(
                f"{self._members.uri} has more than the {self.count} records that {SIZES_FILE} says",
                f"correct or delete {SIZES_FILE}",
            )
        return _row(group, self._members.problems)

    def close(self) -> None:
        """Close the shard."""
        self._ended = True
        self._members.close()

    def _last(self) -> Row:
        """Return what is wrong with the end of the shard."""
        missing = self.count is not None and self._seen < self.count
        if self._members.broken is not None and (missing or self.count is None):
            return Row(problem=f"the tar file breaks off here: {self._members.broken}", place="end")
        if missing:
            return Row(problem=f"the shard has {self._seen} records, {SIZES_FILE} says {self.count}", place="end")
        raise StopIteration


class _Members:
    """The members of a tar file in their order."""

    def __init__(self, location: Location) -> None:
        self.uri = location.uri
        self.problems: dict[str, str] = {}  # of records, by their key
        self.broken: str | None = None
        self._cut_key: str | None = None
        self._file: BinaryIO = location.open()
        self._grouping = package("webdataset.tariterators")

    def grouped(self) -> Iterator[dict[str, Any]]:
        """Yield the members of one record after the other, by their suffix."""
        before: frozenset[str] | None = None
        waiting: dict[str, Any] | None = None
        for group in self._grouping.group_by_keys(self._files(), handler=self._note):
            if waiting is not None:
                yield waiting
                before = frozenset(_suffixes(waiting))
            waiting = group
        if waiting is not None and (self.broken is None or self._is_complete(waiting, before)):
            yield waiting

    def close(self) -> None:
        self._file.close()

    def _files(self) -> Iterator[dict[str, Any]]:
        name = ""  # of the member that is being read
        with reading(self.uri):
            try:
                with tarfile.open(fileobj=self._file, mode="r|*", tarinfo=_Header) as tar:
                    for member in tar:
                        if not member.isreg() or member.name.startswith("__"):
                            continue
                        name, content = member.name, tar.extractfile(member)
                        assert content is not None
                        data = content.read()
                        name = ""
                        yield {"fname": member.name, "data": data, "__url__": self.uri}
                        # Else the headers of the whole archive stay in memory; not in the stubs.
                        tar.members = []  # type: ignore[attr-defined]
            except (tarfile.TarError, *CUT_SHORT) as e:
                self.broken = str(e)
                self._cut_key = self._grouping.base_plus_ext(name)[0]

    def _is_complete(self, group: Mapping[str, Any], before: frozenset[str] | None) -> bool:
        """Tell whether the last record before the break has all its members: as many as the one before it."""
        if group["__key__"] == self._cut_key:
            return False
        return self._cut_key is not None or before is None or before <= frozenset(_suffixes(group))

    def _note(self, error: Exception) -> bool:
        """Keep what the grouping complains about; it names the member first."""
        text = str(error.args[0])
        name = text.partition(": duplicate file name")[0]
        self.problems[self._grouping.base_plus_ext(name)[0]] = f"the tar file has two members '{name}'"
        return True


class _Header(tarfile.TarInfo):
    """A member's header that is damaged or cut short is an error, not the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # not in the stubs
            raise
        except tarfile.HeaderError as e:
            raise tarfile.ReadError(f"{e} at byte {tar.offset}") from e


def _row(group: Mapping[str, Any], problems: Mapping[str, str]) -> Row:
    key = group["__key__"]
    if key in problems:
        return Row(problem=problems[key], id=key, place=key)
    try:
        return Row(fields=_fields(group), id=key, place=key)
    except RecordError as e:
        return Row(problem=str(e), id=key, place=key)


def _fields(group: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = _json(group["json"]) if "json" in group else {}
    media: dict[str, list[dict[str, bytes]]] = {}
    for suffix in _suffixes(group):
        kind = MEDIA.get(suffix.rpartition(".")[2])
        if kind is not None:
            media.setdefault(kind, []).append({"bytes": group[suffix]})
        elif suffix in CAPTIONS:
            fields.setdefault("caption", _text(group[suffix], suffix))
    for held, items in media.items():
        # What the archive holds is what the paths in `json` mean.
        fields.pop(held, None)
        fields[f"{held}s"] = items
    return fields


def _suffixes(group: Mapping[str, Any]) -> list[str]:
    return [name for name in group if not name.startswith("__")]


def _json(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise RecordError(f"broken JSON in its member 'json': {e}") from None
    if not isinstance(fields, dict):
        raise RecordError(f"its member 'json' is {kind_of(fields)} instead of an object")
    return fields


def _text(data: bytes, suffix: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise RecordError(f"its member '{suffix}' is no UTF-8 text") from None


def _sizes(file: Location) -> Mapping[str, int]:
    if not file.is_file():
        return {}
    try:
        sizes = json.loads(file.read())
        return {str(name): int(size) for name, size in sizes.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"{file.uri} does not say how many records the shards have: {e}", "correct or delete it") from e
