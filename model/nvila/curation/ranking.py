"""The best of every group, found by an embedded database in bounded memory, whatever the number of rows."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from nvila.errors import ConfigError, NvilaError, ResourceError

if TYPE_CHECKING:
    import numpy as np
    from duckdb import DuckDBPyConnection
    from numpy.typing import NDArray

MEMORY_LIMIT = "256MB"
_BATCH_ROWS = 2**16
# What is ranked: position, group, part of the group that gets its share, and the key, of which more is better.
CANDIDATES = pa.schema([("index", pa.int64()), ("source", pa.string()), ("part", pa.int32()), ("key", pa.float64())])

_ORDERED = "SELECT source, part, index FROM candidates ORDER BY source, part, key DESC, index"
Quotas = Mapping[tuple[str, int], int]
"""How many rows to choose of each part of each source."""


@contextmanager
def database(scratch: Path | None) -> Iterator[DuckDBPyConnection]:
    """Open a database in memory that spills into a hidden folder of `scratch`; without one it keeps to its memory."""
    import duckdb

    spill = None if scratch is None else scratch / f".duckdb-{os.getpid()}"
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": MEMORY_LIMIT,
        "temp_directory": "" if spill is None else str(spill),
    }
    connection = duckdb.connect(":memory:", config=settings)
    try:
        # It would be written to standard output.
        connection.execute("SET enable_progress_bar = false")
        yield connection
    finally:
        connection.close()
        if spill is not None:
            shutil.rmtree(spill, ignore_errors=True)


def top_of_parts(
    candidates: Iterable[pa.RecordBatch], quotas: Quotas, num_rows: int, *, scratch: Path | None = None
) -> NDArray[np.bool_]:
    """Choose the best rows of every part of every source; ties go to the earlier row.

    Args:
        candidates: Rows of `CANDIDATES`.
        quotas: How many rows to choose, by source and part.
        num_rows: Rows of the whole table, candidates or not.
        scratch: Where the database may spill; None for tables that fit into memory.

    Returns:
        Whether each row of the table is chosen.

    Raises:
        ResourceError: Memory and disk do not suffice.
        NvilaError: What `candidates` raised.
    """
    import duckdb
    import numpy as np

    failures: list[NvilaError] = []

    def watched() -> Iterator[pa.RecordBatch]:
        # The database would wrap the error of whoever makes the rows.
        try:
            yield from candidates
        except NvilaError as e:
            failures.append(e)
            raise

    chosen = np.zeros(num_rows, dtype=np.bool_)
    left = dict(quotas)
    try:
        with database(scratch) as connection:
            connection.register("candidates", pa.RecordBatchReader.from_batches(CANDIDATES, watched()))
            # Sorting spills to disk and comes out in order: what is kept is the beginning of every part.
            for batch in connection.sql(_ORDERED).to_arrow_reader(_BATCH_ROWS):
                _take(batch, left, chosen)
    except duckdb.Error as e:
        raise (failures[0] if failures else _database_error(e)) from e
    return chosen


def part_quotas(counts: Mapping[tuple[str, int], int], quotas: Mapping[str, int]) -> dict[tuple[str, int], int]:
    """Share the quota of every source out over its parts, in proportion to their sizes.

    What does not divide goes to the parts that lost most by rounding down, of equal ones to the first.

    Args:
        counts: Rows of each part.
        quotas: Rows to choose of each source.

    Example:
        >>> part_quotas({("a", 0): 3, ("a", 1): 1}, {"a": 2})
        {('a', 0): 2, ('a', 1): 0}
    """
    totals: dict[str, int] = {}
    for (source, _), count in counts.items():
        totals[source] = totals.get(source, 0) + count
    shared = {(source, part): quotas[source] * count // totals[source] for (source, part), count in counts.items()}
    for source in totals:
        parts = sorted(key for key in counts if key[0] == source)
        lost = sorted(parts, key=lambda key: (-(quotas[source] * counts[key] % totals[source]), key[1]))
        for key in lost[: quotas[source] - sum(shared[key] for key in parts)]:
            shared[key] += 1
    return shared


def _take(batch: pa.RecordBatch, left: dict[tuple[str, int], int], chosen: NDArray[np.bool_]) -> None:
    """Choose from a sorted batch, part after part, what is still wanted."""
    import numpy as np

    sources = batch.column(0).dictionary_encode()
    parts, indices = batch.column(1).to_numpy(), batch.column(2).to_numpy()
    codes = sources.indices.to_numpy()
    starts = np.flatnonzero((np.diff(codes) != 0) | (np.diff(parts) != 0)) + 1
    for start, end in pairwise([0, *starts.tolist(), len(batch)]):
        key = (sources.dictionary[int(codes[start])].as_py(), int(parts[start]))
        taken = min(left.get(key, 0), end - start)
        chosen[indices[start : start + taken]] = True
        if taken:
            left[key] -= taken


def _database_error(error: Exception) -> ResourceError:
    reason = str(error).strip().partition("\n")[0]
    return ResourceError(f"the database cannot rank the scores: {reason}", "free disk space in the output folder")


def quota(rate: float, count: int) -> int:
    """Return ceil(rate * count); rounded first, so that 0.1 of 30 is 3 and not 4."""
    return math.ceil(round(rate * count, 9))


def rate_of(source: str, rates: Mapping[str, float] | float) -> float:
    """Return the keep rate of a source.

    Raises:
        ConfigError: It has none, or one outside 0..1.
    """
    rate = rates.get(source) if isinstance(rates, Mapping) else rates
    if rate is None:
        raise ConfigError(f"no keep rate for source '{source}'", "name every source or give one rate")
    if not 0 <= rate <= 1:
        raise ConfigError(f"keep rate {rate} of source '{source}' is outside 0..1", "0.5 keeps half")
    return rate
