"""One JSON array of records in a file, as LLaVA's data comes; parsed piece by piece."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from nvila.data.readers.locations import CUT_SHORT, reading
from nvila.data.readers.packages import package
from nvila.data.readers.problems import kind_of
from nvila.data.readers.rows import DataFile, Format, Row, Rows
from nvila.errors import DataError

BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 4096


class JsonArray(Format):
    """The format `json`."""

    name = "json"
    suffixes = (".json", ".json.gz")

    def open(self, file: DataFile, fields: Collection[str]) -> Rows:
        """Open a file."""
        return _Items(file)


class _Items(Rows):
    def __init__(self, file: DataFile) -> None:
        ijson = package("ijson")
        self._uri = file.location.uri
        self._file = file.location.open()
        with reading(self._uri):
            head = self._file.read(_HEAD_BYTES)
            start = len(BOM) if head.startswith(BOM) else 0
            self._file.seek(start)
        if not head[start:].lstrip().startswith(b"["):
            self._file.close()
            raise DataError(f"{self._uri} is no JSON array", "write an array of records, or name the format jsonl")
        # Floats, since these are no bank accounts; ijson's own choice is Decimal.
        self._items: Iterator[Any] | None = ijson.items(self._file, "item", use_float=True)
        self._errors = (ijson.JSONError, *CUT_SHORT, UnicodeDecodeError, RecursionError)

    def __next__(self) -> Row:
        if self._items is None:
            raise StopIteration
        try:
            with reading(self._uri):
                return self._next(self._items)
        except StopIteration:
            self._items = None
            raise

    def close(self) -> None:
        self._items = None
        self._file.close()

    def _next(self, items: Iterator[Any]) -> Row:
        try:
            fields = next(items)
        except self._errors as e:
            self._items = None
            return Row(problem=f"the array breaks off here: {str(e).splitlines()[0] if str(e) else type(e).__name__}")
        if not isinstance(fields, dict):
            return Row(problem=f"a record must be an object, this is {kind_of(fields)}")
        return Row(fields=fields)
