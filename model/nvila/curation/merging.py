"""From shards to one table of scores and one list of what has none, in memory that does not grow with them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nvila.curation.problems import OK
from nvila.curation.ranking import database
from nvila.curation.selection import Normalize
from nvila.curation.shards import ParquetFile, Shards, write_lines
from nvila.errors import ArtifactError, DataError

SCORES = "scores.parquet"
QUARANTINE = "quarantine.jsonl"
_MADE_OF = b"nvila.made_of"
# A row for every record of the data set, in its order.
SCORES_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("nll_small", pa.float64()),
        ("nll_large", pa.float64()),
        ("delta", pa.float64()),
        ("num_answer_tokens", pa.int32()),
        ("status", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What all shards together hold.

    Args:
        total: Records.
        statuses: How many there are of each status.
        first_bad: Where the first record without a score is, and why it has none.
    """

    total: int
    statuses: dict[str, int]
    first_bad: str


def merge(shards: Shards, out: Path, normalize: Normalize) -> Merged:
    """Write `scores.parquet` and `quarantine.jsonl` from all shards; the first of several records with an id counts.

    Args:
        shards: All finished.
        out: Directory of the two files.
        normalize: How delta is made of the two likelihoods.

    Raises:
        DataError: The data set has no records.
        ArtifactError: A shard is missing or damaged.
    """
    numbers = shards.finished()
    if numbers is None:
        missing = shards.path(next(number for number in shards.own(0, 1) if not shards.path(number).exists()))
        raise ArtifactError(f"{missing} is not there", "run the same command again to score what is left")
    duplicates = _duplicates(shards, numbers, out)
    statuses: Counter[str] = Counter()
    first_bad: list[str] = []

    def quarantined(file: ParquetFile) -> Iterator[str]:
        for number in numbers:
            table = _marked(shards.read(number), duplicates)
            file.write(_scores(table, normalize))
            for value in table["status"].to_pylist():
                statuses[value] += 1
            for row in table.filter(pc.not_equal(table["status"], OK)).to_pylist():
                if not first_bad:
                    first_bad.append(f"{row['where']}: {row['reason']}")
                yield quarantine_line(row)

    made_of = {_MADE_OF: f"{shards.digest} {normalize}".encode()}
    # The scores appear last: where they are, the quarantine is theirs.
    with ParquetFile(out / SCORES, SCORES_SCHEMA.with_metadata(made_of)) as file:
        write_lines(out / QUARANTINE, quarantined(file))
        if not statuses:
            raise DataError("the data set has no records", "check the path")
    return Merged(total=statuses.total(), statuses=dict(statuses), first_bad="".join(first_bad))


def merged_already(digest: str, out: Path, normalize: Normalize) -> Merged | None:
    """Return what `merge` returned when its files are there and were made of these scores; else None."""
    try:
        metadata = pq.read_schema(out / SCORES).metadata or {}
        with (out / QUARANTINE).open(encoding="utf-8") as lines:
            first = next(lines, None)
    except (OSError, pa.ArrowException):
        return None
    if metadata.get(_MADE_OF) != f"{digest} {normalize}".encode():
        return None
    statuses = count_statuses(out)
    row = json.loads(first) if first else None
    first_bad = f"{row['where']}: {row['reason']}" if row else ""
    return Merged(total=sum(statuses.values()), statuses=statuses, first_bad=first_bad)


def count_statuses(out: Path) -> dict[str, int]:
    """Count the records of each status in `scores.parquet`."""
    statuses: Counter[str] = Counter()
    with pq.ParquetFile(out / SCORES) as file:
        for batch in file.iter_batches(columns=["status"]):
            statuses.update({row["values"]: row["counts"] for row in pc.value_counts(batch["status"]).to_pylist()})
    return dict(statuses)


def write_quarantine(shards: Shards, out: Path) -> None:
    """Write `quarantine.jsonl` of the shards that there are, for a run that stops early."""

    def lines() -> Iterator[str]:
        for number in shards.present():
            table = shards.read(number)
            for row in table.filter(pc.not_equal(table["status"], OK)).to_pylist():
                yield quarantine_line(row)

    write_lines(out / QUARANTINE, lines())


def quarantine_line(row: dict[str, Any]) -> str:
    """Return one line of `quarantine.jsonl`: which record, where it is, and what is wrong with it."""
    names = ("index", "id", "source", "where", "status", "reason")
    return json.dumps({name: row[name] for name in names}, ensure_ascii=False) + "\n"


def _duplicates(shards: Shards, numbers: list[int], out: Path) -> dict[int, str]:
    """Return the records whose source and id came before, by index, with the reason."""
    paths = [str(shards.path(number)) for number in numbers]
    # All records are grouped by eight bytes each; names and places are only held of the few that came twice.
    query = """
        WITH named AS (SELECT *, hash(source, id) AS name FROM read_parquet($paths)
                       WHERE status != 'unreadable' AND id != ''),
             few AS (SELECT index, source, id, "where" FROM named
                     WHERE name IN (SELECT name FROM named GROUP BY name HAVING count(*) > 1))
        SELECT later.index, first.index, first."where"
        FROM few AS later
        JOIN (SELECT source, id, min(index) AS index, arg_min("where", index) AS "where"
              FROM few GROUP BY source, id HAVING count(*) > 1) AS first
        USING (source, id)
        WHERE later.index > first.index
        ORDER BY later.index
    """
    with database(out) as connection:
        found = connection.execute(query, {"paths": paths}).fetchall()
    return {later: f"record {first} ({where}) has the same id" for later, first, where in found}


def _marked(table: pa.Table, duplicates: dict[int, str]) -> pa.Table:
    """Set the status of duplicates, unless something else is wrong with them already."""
    indices = table["index"].to_pylist()
    own = [duplicates.get(index) for index in indices]
    if not any(own):
        return table
    statuses = [
        "duplicate" if reason and status == OK else status
        for status, reason in zip(table["status"].to_pylist(), own, strict=True)
    ]
    reasons = [
        duplicate if status == "duplicate" else reason
        for status, duplicate, reason in zip(statuses, own, table["reason"].to_pylist(), strict=True)
    ]
    table = table.set_column(table.schema.get_field_index("status"), "status", pa.array(statuses, pa.string()))
    return table.set_column(table.schema.get_field_index("reason"), "reason", pa.array(reasons, pa.string()))


def _scores(table: pa.Table, normalize: Normalize) -> pa.Table:
    small, large = table["nll_small"], table["nll_large"]
    if normalize == "token":
        small, large = pc.divide(small, table["tokens_small"]), pc.divide(large, table["tokens_large"])
    scored = pc.equal(table["status"], OK)
    delta = pc.if_else(scored, pc.subtract(small, large), pa.scalar(None, pa.float64()))
    columns = {
        "id": table["id"],
        "source": table["source"],
        "nll_small": table["nll_small"],
        "nll_large": table["nll_large"],
        "delta": delta,
        "num_answer_tokens": table["tokens_large"],
        "status": table["status"],
    }
    return pa.table(columns, schema=SCORES_SCHEMA)


def num_rows(path: Path) -> int:
    """Return the number of rows of a Parquet file.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException) as e:
        raise ArtifactError(f"{path} cannot be read: {e}", "run the same command again") from e
