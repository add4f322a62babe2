"""One JSON array of records in a file, as LLaVA's data comes; parsed piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from nvila.data.readers.locations import CUT_SHORT, reading
from nvila.data.readers.packages import package
from nvila.data.readers.problems import kind_of
from nvila.data.readers.rows import DataFile, Format, Row, Rows
from nvila.errors import DataError

BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 4096
_DEEPEST = 100  # levels; a conversation has five
_TOO_DEEP = object()


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
        events = ijson.basic_parse(self._file, use_float=True)
        self._items: Iterator[Any] | None = _items(events, ijson.ObjectBuilder)
        self._errors = (ijson.JSONError, *CUT_SHORT, ValueError)

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
        if fields is _TOO_DEEP:
            self._items = None
            return Row(problem=f"the array breaks off here: more than {_DEEPEST} levels")
        if not isinstance(fields, dict):
            return Row(problem=f"a record must be an object, this is {kind_of(fields)}")
        return Row(fields=fields)


def _items(events: Iterator[tuple[str, Any]], builder: Callable[[], Any]) -> Iterator[Any]:
    """Build the items of an array from its events; `ijson.items` takes memory by the square of the depth."""
    depth, item = 0, builder()
    for event, value in events:
        depth -= event in ("end_map", "end_array")
        if depth:
            item.event(event, value)
        depth += event in ("start_map", "start_array")
        if depth > _DEEPEST:
            yield _TOO_DEEP
            return
        if depth == 1 and event != "start_array":
            yield item.value
            item = builder()
