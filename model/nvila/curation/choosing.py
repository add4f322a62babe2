"""Choosing from saved scores: counts, quotas, thresholds, methods; nothing is scored here.

The scores are read in batches and never held; what grows with the data set is one bit of truth a record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nvila.curation.merging import SCORES, num_rows
from nvila.curation.problems import OK
from nvila.curation.ranking import CANDIDATES, part_quotas, quota, rate_of, top_of_parts
from nvila.curation.shards import ParquetFile, publish_file
from nvila.errors import ArtifactError, ConfigError, nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Method = Literal["deltaloss", "random", "cluster"]
METHODS: tuple[Method, ...] = ("deltaloss", "random", "cluster")
SELECTION = "selection.parquet"
IGNORE = "ignore"
CLUSTERS = "clusters.parquet"
_BATCH_ROWS = 2**16
_SELECTION_SCHEMA = pa.schema(
    [("id", pa.string()), ("source", pa.string()), ("delta", pa.float64()), ("kept", pa.bool_())]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What to keep.

    Args:
        keep_rate: Share of every source; of its records that have a score.
        rates: Other shares, by source.
        method: By delta, or one of the baselines: at random, or the same share of every cluster of images at random.
        min_delta: Nothing below is kept.
        max_delta: Nothing above is kept; what comes next takes its place.
        seed: Of the baselines.

    Raises:
        ConfigError: A rate is outside 0..1, or the thresholds leave nothing.
    """

    keep_rate: float = 0.5
    rates: Mapping[str, float] = field(default_factory=dict)
    method: Method = "deltaloss"
    min_delta: float | None = None
    max_delta: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for source, rate in (("every source", self.keep_rate), *self.rates.items()):
            rate_of(source, rate)
        if self.min_delta is not None and self.max_delta is not None and self.min_delta > self.max_delta:
            raise ConfigError(
                f"min_delta {self.min_delta:g} is above max_delta {self.max_delta:g}, which keeps nothing", "swap them"
            )

    def quotas(self, scored: Mapping[str, int]) -> dict[str, int]:
        """Return how many records to keep of each source, from how many have a score.

        Raises:
            ConfigError: A rate is given for a source that is not there.
        """
        for source in self.rates:
            if source not in scored:
                raise ConfigError(f"no source '{source}' to keep {self.rates[source]} of", nearest(source, scored))
        return {source: quota(self.rates.get(source, self.keep_rate), count) for source, count in scored.items()}


@dataclass(slots=True, kw_only=True)
class SourceCount:
    """What a source has, and what is kept of it.

    Args:
        records: All.
        scored: Those with a score.
        kept: Those that were chosen.
        boundary: Least delta among the kept; None when nothing is kept.
    """

    records: int = 0
    scored: int = 0
    kept: int = 0
    boundary: float | None = None


def choose(out: Path, rule: Rule) -> NDArray[np.bool_]:
    """Say for every row of `scores.parquet` whether it is kept.

    Args:
        out: Directory with the scores, and for the method `cluster` with `clusters.parquet`.
        rule: What to keep.

    Raises:
        ArtifactError: A file is missing or damaged.
        ConfigError: The rule names a source that is not there.
    """
    scored = {source: count.scored for source, count in count_sources(out).items()}
    quotas = rule.quotas(scored)
    by_part = {(source, 0): count for source, count in quotas.items()}
    if rule.method == "cluster":
        by_part = part_quotas(_count_parts(out), quotas)
    return top_of_parts(_candidates(out, rule), by_part, num_rows(out / SCORES), scratch=out)


def count_sources(out: Path, kept: NDArray[np.bool_] | None = None) -> dict[str, SourceCount]:
    """Count the records of every source, in the order in which sources first appear."""
    counts: dict[str, SourceCount] = {}
    position = 0
    for batch in batches(out / SCORES, ["source", "status", "delta"]):
        columns: dict[str, pa.Array] = {"source": batch["source"], "delta": batch["delta"]}
        columns["scored"] = pc.equal(batch["status"], OK)
        chosen = [False] * len(batch) if kept is None else kept[position : position + len(batch)]
        columns["kept"] = pa.array(chosen, pa.bool_())
        columns["boundary"] = pc.if_else(columns["kept"], batch["delta"], pa.scalar(None, pa.float64()))
        position += len(batch)
        grouped = pa.table(columns).group_by("source", use_threads=False)
        sums = grouped.aggregate([("source", "count"), ("scored", "sum"), ("kept", "sum"), ("boundary", "min")])
        for row in sums.to_pylist():
            count = counts.setdefault(row["source"], SourceCount())
            count.records += row["source_count"]
            count.scored += row["scored_sum"]
            count.kept += row["kept_sum"]
            if row["boundary_min"] is not None:
                low = count.boundary
                count.boundary = row["boundary_min"] if low is None else min(low, row["boundary_min"])
    return counts


def write_selection(
    out: Path, kept: NDArray[np.bool_] | Sequence[bool], ranks: Sequence[float | None] | None = None
) -> dict[str, SourceCount]:
    """Write `selection.parquet` and `ignore/<source>.json` beside the scores.

    Args:
        out: Directory with the scores.
        kept: Whether each record is kept.
        ranks: What was ranked when it is not delta itself.

    Returns:
        What every source has.
    """
    import numpy as np

    chosen = np.asarray(kept, dtype=np.bool_)
    lists = _IgnoreLists(out / IGNORE)
    position = 0
    with ParquetFile(out / SELECTION, _SELECTION_SCHEMA) as file:
        for batch in batches(out / SCORES, ["id", "source", "delta"]):
            part = slice(position, position + len(batch))
            delta = batch["delta"] if ranks is None else pa.array(ranks[part], pa.float64())
            rows = {"id": batch["id"], "source": batch["source"], "delta": delta, "kept": pa.array(chosen[part])}
            file.write(pa.RecordBatch.from_pydict(rows, schema=_SELECTION_SCHEMA))
            lists.add(batch["source"], chosen[part])
            position += len(batch)
    lists.publish()
    return count_sources(out, chosen)


def batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield columns of a Parquet file in parts.

    Raises:
        ArtifactError: It is missing, damaged or lacks a column.
    """
    try:
        with pq.ParquetFile(path) as file:
            missing = set(columns) - set(file.schema_arrow.names)
            if missing:
                raise ArtifactError(f"{path} has no column '{min(missing)}'", "run the same command again")
            yield from file.iter_batches(_BATCH_ROWS, columns=list(columns))
    except (OSError, pa.ArrowException) as e:
        raise ArtifactError(f"{path} cannot be read: {e}", "run the same command again") from e


def _candidates(out: Path, rule: Rule) -> Iterator[pa.RecordBatch]:
    """Yield what may be kept, with the key that it is ranked by."""
    import numpy as np

    # Of every row, kept or not: so the numbers depend on positions and not on how the file is cut into batches.
    numbers = np.random.Generator(np.random.Philox(rule.seed))
    parts = _clusters(out) if rule.method == "cluster" else None
    position = 0
    for batch in batches(out / SCORES, ["source", "delta", "status"]):
        wanted = pc.equal(batch["status"], OK)
        if rule.min_delta is not None:
            wanted = pc.and_kleene(wanted, pc.greater_equal(batch["delta"], rule.min_delta))
        if rule.max_delta is not None:
            wanted = pc.and_kleene(wanted, pc.less_equal(batch["delta"], rule.max_delta))
        size = len(batch)
        key = batch["delta"] if rule.method == "deltaloss" else pa.array(numbers.random(size))
        part = np.zeros(size, np.int32) if parts is None else parts[position : position + size]
        columns = {
            "index": pa.array(np.arange(position, position + size)),
            "source": batch["source"],
            "part": pa.array(part),
            "key": key,
        }
        position += size
        yield pa.RecordBatch.from_pydict(columns, schema=CANDIDATES).filter(wanted)


def _count_parts(out: Path) -> dict[tuple[str, int], int]:
    """Count the records with a score in each cluster of each source."""
    counts: Counter[tuple[str, int]] = Counter()
    for batch in _candidates(out, Rule(method="cluster")):
        grouped = pa.Table.from_batches([batch]).group_by(["source", "part"], use_threads=False)
        for row in grouped.aggregate([("index", "count")]).to_pylist():
            counts[row["source"], row["part"]] += row["index_count"]
    return counts


def _clusters(out: Path) -> NDArray[np.int32]:
    """Return the cluster of every record."""
    import numpy as np

    found = [batch["cluster"].to_numpy() for batch in batches(out / CLUSTERS, ["cluster"])]
    return np.concatenate(found) if found else np.zeros(0, np.int32)


class _IgnoreLists:
    """Files `<source>.json` with the positions, within the source, of what is not kept; never held in memory."""

    _FLUSH = 2**14

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob("*"):
            left.unlink()
        self._seen: dict[str, int] = {}
        self._waiting: dict[str, list[int]] = {}
        self._started: set[str] = set()

    def add(self, sources: pa.Array, kept: NDArray[np.bool_]) -> None:
        """Take the next records."""
        for source, keep in zip(sources.to_pylist(), kept.tolist(), strict=True):
            position = self._seen.get(source, 0)
            self._seen[source] = position + 1
            if not keep:
                self._waiting.setdefault(source, []).append(position)
        for source, positions in list(self._waiting.items()):
            if len(positions) >= self._FLUSH:
                self._flush(source)

    def publish(self) -> None:
        """Close all lists and give the files their names."""
        for source in self._seen:
            self._flush(source)
            with self._temporary(source).open("a", encoding="ascii") as out:
                out.write("]\n")
            publish_file(self._temporary(source), self._directory / f"{file_name(source)}.json")

    def _flush(self, source: str) -> None:
        positions = self._waiting.pop(source, [])
        first = source not in self._started
        self._started.add(source)
        if first or positions:
            with self._temporary(source).open("a", encoding="ascii") as out:
                out.write(("[" if first else ",") + ",".join(map(str, positions)))

    def _temporary(self, source: str) -> Path:
        return self._directory / f".{file_name(source)}.json.tmp"


def file_name(source: str) -> str:
    """Return a source's name as a file name that no name can leave the folder with."""
    name = quote(source, safe=" +=@,()")
    return name.replace(".", "%2E", 1) if name.startswith(".") else name
