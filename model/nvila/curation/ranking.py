"""The best of every group, found by an embedded database in bounded memory, whatever the number of rows."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from nvila.errors import ConfigError, NvilaError, ResourceError

if TYPE_CHECKING:
    import numpy as np
    from duckdb import DuckDBPyConnection
    from numpy.typing import NDArray

MEMORY_LIMIT = "1GB"
_BATCH_ROWS = 2**16
# What is ranked: position, group, part of the group that gets its share, and the key, of which more is better.
CANDIDATES = pa.schema([("index", pa.int64()), ("source", pa.string()), ("part", pa.int32()), ("key", pa.float64())])

_TOP = """
    SELECT index FROM (
        SELECT index, source, row_number() OVER (PARTITION BY source ORDER BY key DESC, index) AS rank FROM candidates
    ) JOIN quotas USING (source) WHERE rank <= quota
"""
# Every part of a source is cut at the same share: a row's place in its part, as a share of the part, is what counts.
_TOP_OF_PARTS = """
    SELECT index FROM (
        SELECT index, source, row_number() OVER (PARTITION BY source ORDER BY share, part, index) AS rank FROM (
            SELECT index, source, part,
                (row_number() OVER (PARTITION BY source, part ORDER BY key DESC, index) - 0.5)
                    / count(*) OVER (PARTITION BY source, part) AS share
            FROM candidates
        )
    ) JOIN quotas USING (source) WHERE rank <= quota
"""


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
        yield connection
    finally:
        connection.close()
        if spill is not None:
            shutil.rmtree(spill, ignore_errors=True)


def top_of_sources(
    candidates: Iterable[pa.RecordBatch],
    quotas: Mapping[str, int],
    num_rows: int,
    *,
    by_part: bool = False,
    scratch: Path | None = None,
) -> NDArray[np.bool_]:
    """Choose the best rows of every source; ties go to the earlier row.

    Args:
        candidates: Rows of `CANDIDATES`.
        quotas: How many rows to choose, by source.
        num_rows: Rows of the whole table, candidates or not.
        by_part: Choose the same share of every part of a source.
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
    try:
        with database(scratch) as connection:
            connection.register("candidates", pa.RecordBatchReader.from_batches(CANDIDATES, watched()))
            table = pa.table({"source": list(quotas), "quota": pa.array(quotas.values(), pa.int64())})
            connection.register("quotas", table)
            found = connection.sql(_TOP_OF_PARTS if by_part else _TOP).to_arrow_reader(_BATCH_ROWS)
            for batch in found:
                chosen[batch.column(0).to_numpy()] = True
    except duckdb.Error as e:
        raise (failures[0] if failures else _database_error(e)) from e
    return chosen


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
