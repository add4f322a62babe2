"""What a saved selection says of every source: how much is kept, dropped and without a score."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable
from typing import TypeAlias

from nvila.data.readers.locations import Location, reading
from nvila.data.readers.packages import package
from nvila.data.selections import SELECTION_FILE

# Records by source and by state: kept, dropped, quarantined; or scored, while nothing is chosen yet.
CurationCounts: TypeAlias = "dict[str, Counter[str]]"


def count_selections(places: Iterable[Location]) -> CurationCounts:
    """Count the records of selections that curation wrote; a list of indices to leave out says too little.

    Args:
        places: Tables, or folders with a `selection.parquet`.

    Returns:
        Records by source and state.

    Raises:
        DataError: A table cannot be read.
    """
    counts: CurationCounts = {}
    for place in {place.uri: place for place in places}.values():
        files = (place, place.below(SELECTION_FILE))
        file = next((file for file in files if file.is_file()), None)
        if file is not None and posixpath.splitext(file.path)[1] != ".json":
            _count_table(file, counts)
    return counts


def _count_table(file: Location, counts: CurationCounts) -> None:
    parquet, compute, arrow = package("pyarrow.parquet"), package("pyarrow.compute"), package("pyarrow")
    with reading(file.uri), file.open() as source:
        table = parquet.ParquetFile(source)
        columns = [name for name in ("source", "kept", "delta") if name in table.schema_arrow.names]
        for batch in table.iter_batches(columns=columns, use_threads=False):
            kept = compute.cast(batch.column("kept"), "bool")
            # Only a record without a score has no delta; tables of others need not have the column.
            scored = batch.column("delta").is_valid() if "delta" in columns else arrow.array([True] * len(batch))
            state = compute.if_else(kept, "kept", compute.if_else(scored, "dropped", "quarantined"))
            rows = arrow.table({"source": compute.cast(batch.column("source"), "string"), "state": state})
            for row in rows.group_by(["source", "state"]).aggregate([([], "count_all")]).to_pylist():
                counts.setdefault(row["source"], Counter())[row["state"]] += row["count_all"]
