"""What a report shows of scores and a selection, counted by an embedded database: of ten million as of ten thousand."""

from __future__ import annotations

from collections.abc import Mapping
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
# Both files have a row for every record, in the same order.
_SCORED = """
    CREATE TEMP TABLE scored AS
    SELECT position, id, source, small, large, delta, kept FROM (
        SELECT s.file_row_number AS position, s.id, s.source, s.nll_small AS small, s.nll_large AS large, s.delta,
            k.kept
        FROM read_parquet($scores, file_row_number = true) AS s POSITIONAL JOIN read_parquet($selection) AS k
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
            connection.execute(_SCORED, {"scores": str(scores), "selection": str(selection)})
            kept = connection.execute("SELECT count(*) FROM read_parquet(?) WHERE kept", [str(selection)]).fetchall()
            scored, below = connection.execute(
                "SELECT count(*), count(*) FILTER (large < small) FROM scored"
            ).fetchall()[0]
            stride = max(1, -(-scored // MAX_POINTS))
            points = connection.execute(
                "SELECT small, large, kept FROM (SELECT *, row_number() OVER (ORDER BY position) AS row FROM scored) "
                "WHERE (row - 1) % ? = 0 ORDER BY row",
                [stride],
            ).fetchall()
            return ScoreSummary(
                records=counts[0],
                kept=kept[0][0],
                sources=_sources(connection),
                points=tuple((small, large, was_kept) for small, large, was_kept in points),
                scored=scored,
                below=below,
                ends={end: _end(connection, *order) for end, order in _ORDERS.items()},
            )
    except duckdb.Error as e:
        reason = str(e).strip().partition("\n")[0]
        raise ArtifactError(f"{scores.name} or {selection.name} cannot be read: {reason}", "run the step again") from e


def _sources(connection: DuckDBPyConnection) -> tuple[SourceSummary, ...]:
    rows = connection.execute("""
        SELECT source, count(*), count(*) FILTER (kept), min(delta) FILTER (kept), max(delta) FILTER (NOT kept),
            quantile_disc(delta, 0.005), quantile_disc(delta, 0.995)
        FROM scored GROUP BY source ORDER BY source
    """).fetchall()
    largest = sorted(rows, key=lambda row: (-row[1], row[0]))[:MAX_PANELS]
    drawn = {row[0]: _histogram(connection, row) for row in largest}
    return tuple(
        SourceSummary(name=name, scored=count, kept=kept, from_delta=lowest, histogram=drawn.get(name))
        for name, count, kept, lowest, *_ in rows
    )


def _histogram(connection: DuckDBPyConnection, row: tuple[Any, ...]) -> DeltaHistogram:
    source, _, _, lowest_kept, highest_ignored, low, high = row
    low, high = min(low, 0.0), max(high, 0.0)
    high = high if high > low else low + 1.0
    found = connection.execute(
        """
        SELECT kept, least(greatest(floor((delta - $low) / $width), 0), $last)::INT AS bar, count(*)
        FROM scored WHERE source = $source GROUP BY ALL
        """,
        {"low": low, "width": (high - low) / BINS, "last": BINS - 1, "source": source},
    ).fetchall()
    bars: dict[bool, list[int]] = {True: [0] * BINS, False: [0] * BINS}
    for kept, bar, count in found:
        bars[kept][bar] = count
    ordered = None not in (lowest_kept, highest_ignored) and lowest_kept >= highest_ignored
    return DeltaHistogram(
        low=low,
        high=high,
        kept=tuple(bars[True]),
        ignored=tuple(bars[False]),
        boundary=(lowest_kept + highest_ignored) / 2 if ordered else None,
    )


def _end(connection: DuckDBPyConnection, condition: str, order: str) -> tuple[Score, ...]:
    rows = connection.execute(
        f"""
        SELECT id, source, small, large, delta, position FROM scored WHERE {condition}
        QUALIFY row_number() OVER (PARTITION BY source ORDER BY {order}, position) <= {OFFERED}
        ORDER BY {order}, position
        """  # noqa: S608  # the parts come from the table above
    ).fetchall()
    names = ("id", "source", "small", "large", "delta", "position")
    return tuple(Score(**dict(zip(names, row, strict=True))) for row in rows)
