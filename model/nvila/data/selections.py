"""A part of a data set: what a saved selection keeps of it."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from nvila.data.readers.locations import Location, reading
from nvila.data.readers.packages import package
from nvila.data.readers.record import CountedStream, Record
from nvila.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

SELECTION_FILE = "selection.parquet"
COLUMNS = ("id", "source", "kept")
_BATCH = 4096


class Selection(Protocol):
    """What is kept of a data set."""

    where: str

    def positions(self, stream: CountedStream) -> np.ndarray[Any, Any]:
        """Return the indices of the records that are kept, ascending.

        Raises:
            ConfigError: The selection is of another data set.
        """


def open_selection(place: Location, dataset: str) -> Selection:
    """Open a selection.

    Args:
        place: A Parquet table with the columns id, source and kept; a JSON list of the indices to leave out; or a
            folder with `selection.parquet`, or with such a list as `<data set>.json`.
        dataset: Name of the data set.

    Raises:
        ConfigError: There is none.
        DataError: It is damaged.
    """
    names = ("", SELECTION_FILE, f"{dataset}.json")
    files = [place.below(name) if name else place for name in names]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ConfigError(
            f"the selection {place.uri} does not exist",
            f"name a {SELECTION_FILE}, a JSON list of indices, or a folder with {SELECTION_FILE} or {dataset}.json",
        )
    return IgnoreList(found) if posixpath.splitext(found.path)[1] == ".json" else KeptTable(found)


class KeptTable:
    """A table that says of every sample whether it is kept, as curation writes it.

    Args:
        file: A Parquet file.
    """

    def __init__(self, file: Location) -> None:
        self.where = file.uri
        self._file = file

    def positions(self, stream: CountedStream) -> np.ndarray[Any, Any]:
        """Return the indices of the records whose id and source are kept; those without a sample are not.

        Of several records with one id the first are taken, as many as the table keeps: a duplicate that curation left
        out stays out.
        """
        import numpy as np

        kept, example = self._kept()
        known, left = np.unique(kept, return_counts=True)
        found: list[np.ndarray[Any, Any]] = []
        indices: list[int] = []
        digests: list[int] = []
        seen = ""

        def flush() -> None:
            own = np.array(digests, dtype=np.uint64)
            slots = np.searchsorted(known, own)
            chosen = np.isin(own, known)
            for place in np.flatnonzero(chosen):
                chosen[place] = left[slots[place]] > 0
                left[slots[place]] -= 1
            found.append(np.array(indices, dtype=np.int64)[chosen])
            indices.clear()
            digests.clear()

        for record in stream.records():
            if record.sample is not None:
                seen = seen or f"'{record.sample.id}' of source '{record.sample.source}'"
                indices.append(record.index)
                digests.append(_digest(record.sample.source, record.sample.id))
            if len(indices) == _BATCH:
                flush()
        flush()
        positions = np.concatenate(found)
        if not len(positions):
            raise ConfigError(
                f"the selection {self.where} keeps none of the records of '{stream.name}'",
                f"it keeps {example}; the data set has {seen or 'no usable record'}",
            )
        return positions

    def _kept(self) -> tuple[np.ndarray[Any, Any], str]:
        """Return digests of what is kept, and one of them in words."""
        import numpy as np

        parts: list[np.ndarray[Any, Any]] = [np.array([], dtype=np.uint64)]
        example = "nothing"
        for sources, ids in self._rows():
            if ids and example == "nothing":
                example = f"'{ids[0]}' of source '{sources[0]}'"
            parts.append(np.array(list(map(_digest, sources, ids)), dtype=np.uint64))
        return np.concatenate(parts), example

    def _rows(self) -> Iterator[tuple[list[str], list[str]]]:
        pq, compute = package("pyarrow.parquet"), package("pyarrow.compute")
        with reading(self.where), self._file.open() as source:
            table = pq.ParquetFile(source)
            missing = [name for name in COLUMNS if name not in table.schema_arrow.names]
            if missing:
                raise ConfigError(
                    f"the selection {self.where} has no column {', '.join(missing)}", f"it needs {', '.join(COLUMNS)}"
                )
            for batch in table.iter_batches(columns=list(COLUMNS), use_threads=False):
                rows = batch.filter(compute.cast(batch.column("kept"), "bool"))
                yield list(map(str, rows.column("source").to_pylist())), list(map(str, rows.column("id").to_pylist()))


class IgnoreList:
    """A list of the indices that are left out, as the published code reads it.

    Args:
        file: A JSON file.
    """

    def __init__(self, file: Location) -> None:
        self.where = file.uri
        self._file = file

    def positions(self, stream: CountedStream) -> np.ndarray[Any, Any]:
        """Return the indices that are not in the list."""
        import numpy as np

        ignored, count = self._ignored(), stream.count()
        if ignored and not 0 <= min(ignored) <= max(ignored) < count:
            worst = max(ignored) if min(ignored) >= 0 else min(ignored)
            raise ConfigError(
                f"the selection {self.where} leaves out record {worst}, '{stream.name}' has {count}",
                "use the list of this data set",
            )
        kept = np.ones(count, dtype=bool)
        kept[ignored] = False
        if not kept.any():
            raise ConfigError(f"the selection {self.where} leaves out all of '{stream.name}'", "leave it out instead")
        return np.flatnonzero(kept)

    def _ignored(self) -> list[int]:
        try:
            values = json.loads(self._file.read())
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"the selection {self.where} is broken JSON: {e}", "write a list of indices") from e
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise ConfigError(f"the selection {self.where} is no list of indices", "write a JSON list of whole numbers")
        return values


class SelectedStream:
    """What a selection keeps of a stream, numbered anew.

    Args:
        stream: The data set.
        selection: What is kept.
    """

    def __init__(self, stream: CountedStream, selection: Selection) -> None:
        self._stream = stream
        self._selection = selection
        self._kept: np.ndarray[Any, Any] | None = None

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self._stream.name

    def count(self) -> int:
        """Return the number of records that are kept."""
        return len(self._positions())

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Yield the kept records with start <= index < stop.

        Raises:
            ConfigError: The selection is of another data set.
            DataError: The data set cannot be read.
        """
        positions = self._positions()[start:stop]
        if not len(positions):
            return
        index = 0
        for record in self._stream.records(int(positions[0]), int(positions[-1]) + 1):
            while index < len(positions) and positions[index] < record.index:
                index += 1  # a damaged file lacks records
            if index < len(positions) and positions[index] == record.index:
                yield replace(record, index=start + index)

    def _positions(self) -> np.ndarray[Any, Any]:
        if self._kept is None:
            self._kept = self._selection.positions(self._stream)
        return self._kept


def _digest(source: str, id: str) -> int:
    """Return eight bytes for a sample: ten million of them are 80 MB, and one wrongly kept is a case in 200,000."""
    text = f"{source}\0{id}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
