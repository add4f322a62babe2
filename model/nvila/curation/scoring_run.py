"""Scoring a data set, shard by shard: what one process of any number does."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict, TypeVar

import pyarrow as pa
import torch

from nvila.curation.encoding import Outcome
from nvila.curation.nvila_scorer import NvilaScorer
from nvila.curation.problems import OK, Problem, check_share
from nvila.curation.scorers import Scorer
from nvila.curation.shards import SCHEMA, Shards
from nvila.curation.windows import FrameSampling, Window, ahead, windows
from nvila.data.readers.record import Record, RecordStream
from nvila.errors import ArtifactError, CapabilityError
from nvila.progress import SILENT, Reporter

Size = Literal["small", "large"]
SIZES: tuple[Size, ...] = ("small", "large")
_HALF = pa.schema(
    [
        ("index", pa.int64()),
        ("nll", pa.float64()),
        ("tokens", pa.int32()),
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)


_LACKING = Problem(status="unreadable", reason="the file that should hold this record is damaged")
_Row = TypeVar("_Row")


@dataclass(slots=True, kw_only=True)
class ScoringRun:
    """One process's part of scoring.

    Args:
        stream: The data set.
        load: Loads the small or the large checkpoint; asked when there is something to score.
        samplings: How the two checkpoints sample videos.
        shards: Where scores go.
        batch_tokens: Most positions of a batch, padding included.
        sequential: Score everything with the small model, forget it, then load the large one.
        rank: This process.
        world: Number of processes.
        max_bad: Stop when more than this share of the data set cannot be scored.
        total: Records of the data set; None when nobody knows, then this process cannot tell what share is bad.
        reporter: Receives progress in samples.
    """

    stream: RecordStream
    load: Callable[[Size], Scorer]
    samplings: frozenset[FrameSampling]
    shards: Shards
    batch_tokens: int
    sequential: bool = False
    rank: int = 0
    world: int = 1
    max_bad: float = 1.0
    total: int | None = None
    reporter: Reporter = SILENT
    _scorers: dict[Size, Scorer] = field(init=False, default_factory=dict)
    _bad: Counter[str] = field(init=False, default_factory=Counter)
    _first_bad: str = field(init=False, default="")
    _done: int = field(init=False, default=0)

    def run(self) -> None:
        """Score this rank's shards; finished ones are left alone.

        Raises:
            DataError: The data set cannot be read, or too many of its records cannot be scored.
            ConfigError: The directory holds scores of another configuration.
        """
        if self.sequential:
            self._pass("small", "small", self._half, instead="scores")
            self._forget()
        self._pass("scores", "large" if self.sequential else "score", self._whole)
        self._forget()

    def run_features(self) -> None:
        """Make the vision features of this rank's shards with the small model, for clusters of like images.

        Raises:
            CapabilityError: The small model has no vision tower.
        """
        self._pass("features", "features", self._features)
        self._forget()

    def _pass(self, kind: str, phase: str, make: Callable[[int, str], pa.Table], instead: str | None = None) -> None:
        """Go over this rank's shards once; `make` makes what is not there, and `instead` is as good."""
        self._done = 0
        for number in self.shards.own(self.rank, self.world):
            rows = self.shards.rows(number, kind)
            if rows is None and instead is not None:
                rows = self.shards.rows(number, instead)
            if rows is None:
                table = make(number, phase)
                self.shards.publish(number, table, kind)
                rows = table.num_rows
                if kind == "scores":
                    self._check(table)
            else:
                self._done += rows
                if kind == "scores" and self.max_bad < 1:
                    self._check(self.shards.read(number))
            self.reporter.progress(phase, self._done, self._own_total())
            if rows < self.shards.size:
                return

    def _whole(self, number: int, phase: str) -> pa.Table:
        """Score a shard with both models, or with the large one where the small one's half is there."""
        halves = (
            {row["index"]: row for row in self.shards.read(number, "small").to_pylist()} if self.sequential else None
        )
        sizes: Sequence[Size] = SIZES if halves is None else ("large",)
        rows: dict[int, dict[str, object]] = {}
        for window, outcomes in self._windows(number, phase, sizes):
            for place, (record, sample) in enumerate(zip(window.records, window.samples, strict=True)):
                large = _flat(outcomes["large"][place])
                if halves is None:
                    small = _flat(outcomes["small"][place])
                elif record.index in halves:
                    small = halves[record.index]
                else:
                    raise self._changed(number)
                rows[record.index] = self._row(record, isinstance(sample, Problem), small, large)
        if halves is not None and len(self._positions(number, rows)) != len(halves):
            raise self._changed(number)
        return pa.Table.from_pylist(list(self._complete(number, rows, self._lacking)), schema=SCHEMA)

    def _half(self, number: int, phase: str) -> pa.Table:
        rows = {
            record.index: {"index": record.index, **_flat(outcome)}
            for window, outcomes in self._windows(number, phase, ("small",))
            for record, outcome in zip(window.records, outcomes["small"], strict=True)
        }
        lacking: Problem = _LACKING
        complete = self._complete(number, rows, lambda index, before: {"index": index, **_flat(lacking)})
        return pa.Table.from_pylist(list(complete), schema=_HALF)

    def _features(self, number: int, phase: str) -> pa.Table:
        rows: dict[int, list[float] | None] = {}
        for window in self._read(number, phase):
            scorer = self._scorer("small")
            if not isinstance(scorer, NvilaScorer):
                raise CapabilityError("the small model has no vision tower to compare images", "use --method random")
            for record, one in zip(window.records, scorer.features(window), strict=True):
                rows[record.index] = None if one is None else one.tolist()
        found = [rows.get(index) for index in self._positions(number, rows)]
        return pa.table({"features": pa.array(found, pa.list_(pa.float32()))})

    def _positions(self, number: int, rows: Mapping[int, object]) -> range:
        """Return the positions of a shard: all that the data set has, also those that a damaged file lacks."""
        start = number * self.shards.size
        end = max(rows, default=start - 1) + 1 if self.total is None else min(start + self.shards.size, self.total)
        return range(start, max(start, end))

    def _complete(
        self, number: int, rows: Mapping[int, _Row], lacking: Callable[[int, _Row | None], _Row]
    ) -> Iterator[_Row]:
        """Yield a row for every position of a shard, so that rows of tables are positions of the data set."""
        before: _Row | None = None
        for index in self._positions(number, rows):
            before = rows[index] if index in rows else lacking(index, before)
            yield before

    def _lacking(self, index: int, before: dict[str, object] | None) -> dict[str, object]:
        source = str(before["source"]) if before is not None else self.stream.name
        record = Record(index=index, where=f"{self.stream.name}:{index + 1}", sample=None, source=source)
        return self._row(record, True, _flat(_LACKING), _flat(_LACKING))

    def _changed(self, number: int) -> ArtifactError:
        return ArtifactError(
            f"{self.shards.path(number, 'small')} has other records than the data set now",
            f"the data changed; delete {self.shards.directory} and run again",
        )

    def _windows(
        self, number: int, phase: str, sizes: Sequence[Size]
    ) -> Iterator[tuple[Window, dict[Size, list[Outcome]]]]:
        """Yield the windows of a shard with what the models say."""
        for window in self._read(number, phase):
            yield window, {size: self._scorer(size).score(window, self.batch_tokens) for size in sizes}

    def _read(self, number: int, phase: str) -> Iterator[Window]:
        """Yield the windows of a shard; one is done when the next one is asked for."""
        records = self.stream.records(number * self.shards.size, (number + 1) * self.shards.size)
        for window in ahead(windows(records, self.samplings)):
            yield window
            self._done += len(window.records)
            self.reporter.progress(phase, self._done, self._own_total())

    def _row(self, record: Record, is_bad: bool, small: _Flat, large: _Flat) -> dict[str, object]:
        status: str = OK
        reason = None
        for name, half in (("small", small), ("large", large)):
            if status == OK and half["status"] != OK:
                # What is wrong with the record itself is wrong under any model.
                status, reason = half["status"], half["reason"] if is_bad else f"{name} model: {half['reason']}"
        return {
            "index": record.index,
            "id": record.sample.id if record.sample is not None else "",
            "source": record.sample.source if record.sample is not None else record.source or self.stream.name,
            "where": record.where,
            "nll_small": small["nll"],
            "nll_large": large["nll"],
            "tokens_small": small["tokens"],
            "tokens_large": large["tokens"],
            "status": status,
            "reason": reason,
        }

    def _scorer(self, size: Size) -> Scorer:
        if size not in self._scorers:
            self._scorers[size] = self.load(size)
        return self._scorers[size]

    def _forget(self) -> None:
        """Free the memory of the models."""
        self._scorers.clear()
        gc.collect()
        torch.cuda.empty_cache()

    def _own_total(self) -> int:
        """Records of this rank's shards; 0 while nobody knows."""
        if self.total is None:
            return 0
        size = self.shards.size
        return sum(min(size, self.total - start) for start in range(self.rank * size, self.total, self.world * size))

    def _check(self, table: pa.Table) -> None:
        """Stop as soon as it is certain that too many records are bad."""
        for row in table.select(["where", "status", "reason"]).to_pylist():
            if row["status"] != OK:
                self._bad[row["status"]] += 1
                self._first_bad = self._first_bad or f"{row['where']}: {row['reason']}"
        if self.total is not None:
            check_share(self._bad, self.total, self.max_bad, self._first_bad)


class _Flat(TypedDict):
    """One model's outcome as columns."""

    nll: float | None
    tokens: int | None
    status: str
    reason: str | None


def _flat(outcome: Outcome) -> _Flat:
    if isinstance(outcome, Problem):
        return {"nll": None, "tokens": None, "status": outcome.status, "reason": outcome.reason}
    return {"nll": outcome.nll, "tokens": outcome.num_tokens, "status": OK, "reason": None}
