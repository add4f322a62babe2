"""JSON lines: one record a line."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import BinaryIO

from nvila.data.readers.locations import CUT_SHORT, reading
from nvila.data.readers.problems import kind_of
from nvila.data.readers.rows import DataFile, Format, Row, Rows

# Longer than any record with inlined images; a file without line ends must not fill the memory.
LONGEST_LINE = 256 * 2**20


class JsonLines(Format):
    """The format `jsonl`."""

    name = "jsonl"
    suffixes = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")

    def open(self, file: DataFile, fields: Collection[str]) -> Rows:
        """Open a file."""
        return _Lines(file)


class _Lines(Rows):
    def __init__(self, file: DataFile) -> None:
        self._uri = file.location.uri
        self._file: BinaryIO = file.location.open()
        self._ended = False

    def __next__(self) -> Row:
        line = self._line()
        if isinstance(line, Row):
            return line
        if not line.strip():
            return Row(problem="the line is empty")
        try:
            fields = json.loads(line.rstrip())
        except RecursionError:
            return Row(problem="broken JSON: nested too deeply")
        except json.JSONDecodeError as e:
            return Row(problem=f"broken JSON: {e.msg} at character {e.pos + 1}")
        except ValueError as e:  # no UTF-8
            return Row(problem=f"broken JSON: {e}")
        if not isinstance(fields, dict):
            return Row(problem=f"a record must be an object, this is {kind_of(fields)}")
        return Row(fields=fields)

    def skip(self, count: int) -> int:
        skipped = 0
        try:
            while skipped < count:
                self._line()
                skipped += 1
        except StopIteration:
            pass
        return skipped

    def close(self) -> None:
        self._ended = True
        self._file.close()

    def _line(self) -> bytes | Row:
        if self._ended:
            raise StopIteration
        try:
            with reading(self._uri):
                line = self._readline()
        except _CutShortError as e:
            self._ended = True
            return Row(problem=f"the file is cut short or damaged from here on: {e}")
        if not line:
            self._ended = True
            raise StopIteration
        if len(line) > LONGEST_LINE:
            return Row(problem=f"the line has more than {LONGEST_LINE:,} bytes")
        return line

    def _readline(self) -> bytes:
        try:
            line = self._file.readline(LONGEST_LINE + 1)
            rest = line
            while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
                rest = self._file.readline(LONGEST_LINE + 1)
        except CUT_SHORT as e:
            raise _CutShortError(str(e)) from e
        return line


class _CutShortError(Exception):
    """The file breaks off."""
