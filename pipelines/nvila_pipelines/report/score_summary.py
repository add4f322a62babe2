"""What a report shows of scores and a selection, counted by an embedded database: of ten million as of ten thousand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nvila.errors import ArtifactError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

End = Literal["informative", "redundant", "distracting"]

# A page with a panel for each of a hundred sources would help nobody and pass the size limit.
MAX_PANELS = 12
BINS = 32
MAX_POINTS = 1500
# Samples that each source may offer to the gallery, at each end.
OFFERED = 6
_ORDERS: Mapping[End, tuple[str, str]] = {
    "informative": ("true", "-delta"),
    "redundant": ("true", "abs(delta)"),
    "distracting": ("delta < 0", "delta"),
}
# Rows that the ends of a histogram's scale are read from; an exact quantile would hold all of them.
_SCALE_ROWS = 100_000
# Both files have a row for every record, in the same order. Nothing is copied: each question reads them again.
_SCORED = """
    CREATE TEMP VIEW scored AS
    SELECT position, id, source, small, large, delta, kept FROM (
        SELECT s.file_row_number AS position, s.id, s.source, s.nll_small AS small, s.nll_large AS large, s.delta,
            k.kept
        FROM read_parquet({scores}, file_row_number = true) AS s POSITIONAL JOIN read_parquet({selection}) AS k
    ) WHERE isfinite(delta) AND isfinite(small) AND isfinite(large)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What the two scorers said about one sample.

    Args:
        id: Of the sample.
        source: Where it comes from.
        small: Its loss under the small scorer.
        large: Its loss under the large scorer.
        delta: What is ranked.
        position: Place in the data set, from 0.
    """

    id: str
    source: str
    small: float
    large: float
    delta: float
    position: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaHistogram:
    """How delta is distributed in a source; the outermost bars also count what lies beyond the scale.

    Args:
        low: Left end of the scale.
        high: Right end of the scale.
        kept: Kept samples in each of `BINS` bars.
        ignored: The others.
        boundary: Between kept and ignored; None when one of them is empty or the selection follows another order.
    """

    low: float
    high: float
    kept: tuple[int, ...]
    ignored: tuple[int, ...]
    boundary: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSummary:
    """One source with its histogram.

    Args:
        name: Of the source.
        scored: Samples with a score.
        kept: Samples kept.
        from_delta: Least delta among the kept; None when nothing is kept.
        histogram: None for a source that gets no panel.
    """

    name: str
    scored: int
    kept: int
    from_delta: float | None
    histogram: DeltaHistogram | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSummary:
    """All that a report shows of scores.

    Args:
        records: Rows of the table.
        kept: Rows that are kept.
        sources: By name.
        points: Losses under the small and the large scorer, and whether kept, of an even sub-sample.
        scored: Rows with a score.
        below: Of those, how many the large scorer finds more likely.
        ends: Samples at both ends and in the middle of the delta scale, some from every source.
    """

    records: int
    kept: int
    sources: tuple[SourceSummary, ...]
    points: tuple[tuple[float, float, bool], ...]
    scored: int
    below: int
    ends: Mapping[End, tuple[Score, ...]]


def summarise(scores: Path, selection: Path, scratch: Path | None = None) -> ScoreSummary:
    """Read a table of scores and its selection.

    Args:
        scores: `scores.parquet`.
        selection: `selection.parquet`.
        scratch: Where the database may spill.

    Raises:
        ArtifactError: A file is damaged, or they do not belong together.
    """
    import duckdb

    from nvila.curation.ranking import database

    try:
        with database(scratch) as connection:
            counts = [
                connection.execute("SELECT count(*) FROM read_parquet(?)", [str(path)]).fetchall()[0][0]
                for path in (scores, selection)
            ]
            if counts[0] != counts[1]:
                raise ArtifactError(f"{scores.name} has {counts[0]} rows, {selection.name} {counts[1]}", "choose again")
            connection.execute(_SCORED.format(scores=_quoted(scores), selection=_quoted(selection)))
            kept = connection.execute("SELECT count(*) FROM read_parquet(?) WHERE kept", [str(selection)]).fetchall()
            scored, below = connection.execute(
                "SELECT count(*), count(*) FILTER (large < small) FROM scored"
            ).fetchall()[0]
            points = connection.execute(
                "SELECT small, large, kept FROM scored WHERE position % ? = 0 ORDER BY position",
                [_stride(counts[0], MAX_POINTS)],
            ).fetchall()
            return ScoreSummary(
                records=counts[0],
                kept=kept[0][0],
                sources=_sources(connection, counts[0]),
                points=tuple((small, large, was_kept) for small, large, was_kept in points),
                scored=scored,
                below=below,
                ends={end: _end(connection, *order) for end, order in _ORDERS.items()},
            )
    except duckdb.Error as e:
        reason = str(e).strip().partition("\n")[0]
        raise ArtifactError(f"{scores.name} or {selection.name} cannot be read: {reason}", "run the step again") from e


def _sources(connection: DuckDBPyConnection, records: int) -> tuple[SourceSummary, ...]:
    rows = connection.execute(
        """
        SELECT source, count(*), count(*) FILTER (kept), min(delta) FILTER (kept), max(delta) FILTER (NOT kept),
            quantile_disc(delta, 0.005) FILTER (position % $stride = 0),
            quantile_disc(delta, 0.995) FILTER (position % $stride = 0), min(delta), max(delta)
        FROM scored GROUP BY source ORDER BY source
        """,
        {"stride": _stride(records, _SCALE_ROWS)},
    ).fetchall()
    largest = sorted(rows, key=lambda row: (-row[1], row[0]))[:MAX_PANELS]
    drawn = _histograms(connection, largest)
    return tuple(
        SourceSummary(name=name, scored=count, kept=kept, from_delta=lowest, histogram=drawn.get(name))
        for name, count, kept, lowest, *_ in rows
    )


def _histograms(connection: DuckDBPyConnection, rows: Sequence[tuple[Any, ...]]) -> dict[str, DeltaHistogram]:
    """Count the bars of some sources, all in one reading."""
    scales = {}
    for source, _, _, _, _, low, high, least, most in rows:
        # A source so rare that no row of the sample is its own shows all of it.
        low, high = min(least if low is None else low, 0.0), max(most if high is None else high, 0.0)
        scales[source] = (low, high if high > low else low + 1.0)
    connection.execute("CREATE TEMP TABLE scales (source VARCHAR, low DOUBLE, width DOUBLE)")
    for source, (low, high) in scales.items():
        connection.execute("INSERT INTO scales VALUES (?, ?, ?)", [source, low, (high - low) / BINS])
    found = connection.execute(
        """
        SELECT source, kept, least(greatest(floor((delta - low) / width), 0), $last)::INT AS bar, count(*)
        FROM scored JOIN scales USING (source) GROUP BY ALL
        """,
        {"last": BINS - 1},
    ).fetchall()
    bars: dict[str, dict[bool, list[int]]] = {name: {True: [0] * BINS, False: [0] * BINS} for name in scales}
    for source, kept, bar, count in found:
        bars[source][kept][bar] = count
    drawn = {}
    for source, _, _, lowest_kept, highest_ignored, *_ in rows:
        ordered = None not in (lowest_kept, highest_ignored) and lowest_kept >= highest_ignored
        drawn[source] = DeltaHistogram(
            low=scales[source][0],
            high=scales[source][1],
            kept=tuple(bars[source][True]),
            ignored=tuple(bars[source][False]),
            boundary=(lowest_kept + highest_ignored) / 2 if ordered else None,
        )
    return drawn


def _end(connection: DuckDBPyConnection, condition: str, order: str) -> tuple[Score, ...]:
    """Return the first samples of every source in an order, without sorting all of them."""
    first = f"min({{'key': {order}, 'position': position, 'id': id, 'small': small, 'large': large, 'delta': delta}}, "
    found = connection.execute(
        f"SELECT source, {first}{OFFERED}) FROM scored WHERE {condition} GROUP BY source"  # noqa: S608  # no one's input
    ).fetchall()
    rows = sorted(
        ((row["key"], row["position"], source, row) for source, best in found for row in best),
        key=lambda row: row[:2],
    )
    return tuple(
        Score(
            id=row["id"], source=source, small=row["small"], large=row["large"], delta=row["delta"], position=position
        )
        for _, position, source, row in rows
    )


def _stride(rows: int, wanted: int) -> int:
    """Every how many rows to take one for as many as are wanted."""
    return max(1, -(-rows // wanted))


def _quoted(path: Path) -> str:
    """Return a path as SQL text: a view takes no parameters."""
    return "'" + str(path).replace("'", "''") + "'"
