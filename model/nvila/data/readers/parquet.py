"""Parquet files, with images as bytes or as paths."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from nvila.data.readers.locations import reading
from nvila.data.readers.packages import package
from nvila.data.readers.rows import DataFile, Format, Rows
from nvila.data.readers.tables import BATCH_ROWS, BoundedFile, TableRows, wanted_columns
from nvila.errors import DataError

_BUFFER_BYTES = 2**20


class Parquet(Format):
    """The format `parquet`."""

    name = "parquet"
    suffixes = (".parquet", ".pq")

    def open(self, file: DataFile, fields: Collection[str]) -> Rows:
        """Open a file; only columns that mean something are read."""
        return _ParquetRows(file, fields)

    def count(self, file: DataFile) -> int | None:
        """The footer says it."""
        table, source = _open(file)
        with source:
            return int(table.metadata.num_rows)


class _ParquetRows(TableRows):
    def __init__(self, file: DataFile, fields: Collection[str]) -> None:
        super().__init__()
        self._table, self._source = _open(file)
        self._columns = wanted_columns(self._table.schema_arrow.names, fields, file.location.uri)
        self.count = int(self._table.metadata.num_rows)
        self._group = 0  # the next one
        self._left = 0  # rows of the group before it that are not read
        self._batches: Iterator[Any] = iter(())

    def close(self) -> None:
        """Close the file."""
        self._group = self._table.num_row_groups
        self._batches = iter(())
        self._source.close()

    def _next_batch(self) -> Any:
        while self._left == 0 and self._group < self._table.num_row_groups:
            self._left = self._table.metadata.row_group(self._group).num_rows
            self._group += 1
            self._batches = self._table.iter_batches(
                BATCH_ROWS, row_groups=[self._group - 1], columns=self._columns, use_threads=False
            )
        batch = next(self._batches, None)
        self._left -= batch.num_rows if batch is not None else 0
        return batch

    def _num_lost(self) -> int:
        # The other row groups are read all the same, so that every range of rows gives the same records.
        lost, self._left = self._left, 0
        return lost

    def _skip_unread(self, count: int) -> int:
        skipped = 0
        while self._left == 0 and self._group < self._table.num_row_groups:
            rows = self._table.metadata.row_group(self._group).num_rows
            if skipped + rows > count:
                break
            skipped += rows
            self._group += 1
        return skipped


def _open(file: DataFile) -> tuple[Any, Any]:
    pq, pa = package("pyarrow.parquet"), package("pyarrow")
    source = file.location.open()
    try:
        with reading(file.location.uri):
            # Pages are read as they are needed; whole column chunks of images would fill the memory.
            return pq.ParquetFile(BoundedFile(source), pre_buffer=False, buffer_size=_BUFFER_BYTES), source
    except pa.ArrowException as e:
        source.close()
        raise DataError(f"{file.location.uri} is no Parquet file: {e}", "replace the file") from e
    except BaseException:
        source.close()
        raise
