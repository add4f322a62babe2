"""Arrow files, as `datasets.Dataset.save_to_disk` writes them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from nvila.data.readers.locations import reading
from nvila.data.readers.packages import package
from nvila.data.readers.rows import DataFile, Format, Rows
from nvila.data.readers.tables import BoundedFile, TableRows, wanted_columns
from nvila.errors import DataError

_FILE_MAGIC = b"ARROW1"


class Arrow(Format):
    """The format `arrow`."""

    name = "arrow"
    suffixes = (".arrow",)

    def open(self, file: DataFile, fields: Collection[str]) -> Rows:
        """Open a file."""
        return _ArrowRows(file, fields)


class _ArrowRows(TableRows):
    def __init__(self, file: DataFile, fields: Collection[str]) -> None:
        super().__init__()
        self._unchecked = 0  # rows of a batch that did not pass
        pa, uri = package("pyarrow"), file.location.uri
        self._file = file.location.open()
        try:
            with reading(uri):
                self._batches = _batches(pa, BoundedFile(self._file))
                self._columns = wanted_columns(next(self._batches), fields, uri)
        except pa.ArrowException as e:
            self._file.close()
            raise DataError(f"{uri} is no Arrow file: {e}", "replace the file") from e
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._batches = iter(())
        self._file.close()

    def _next_batch(self) -> Any:
        batch = next(self._batches, None)
        if batch is None:
            return None
        batch = batch.select(self._columns)
        self._unchecked = batch.num_rows
        # Nothing else checks offsets, and wrong ones crash the process.
        batch.validate(full=True)
        self._unchecked = 0
        return batch

    def _num_lost(self) -> int:
        lost, self._unchecked = self._unchecked, 0
        if lost:
            return lost
        self._batches = iter(())
        return 1  # the rest of the file; nothing says how much that is


def _batches(pa: Any, file: Any) -> Iterator[Any]:
    """Yield the names of the columns, then the record batches."""
    is_file = file.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    file.seek(0)
    reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
    yield reader.schema.names
    if is_file:
        yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
        yield from reader
