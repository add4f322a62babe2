"""Histograms and scatter of a selection, the same in the report of a run and in that of a data set."""

from __future__ import annotations

from dataclasses import dataclass

from nvila_pipelines.report import plots
from nvila_pipelines.report.gallery import Group
from nvila_pipelines.report.score_summary import MAX_PANELS, ScoreSummary, SourceSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One figure with its title and the sentence below it."""

    title: str
    svg: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What the curation section shows."""

    text: str
    panels: tuple[Panel, ...]
    scatter: Panel
    groups: tuple[Group, ...]


def selection_of(summary: ScoreSummary, groups: tuple[Group, ...]) -> Selection:
    """Draw a summary of scores.

    Args:
        summary: Of the scores and their selection.
        groups: Curated samples as pictures.
    """
    text = f"{summary.kept:,} of {summary.records:,} samples were kept"
    many = len(summary.sources) > MAX_PANELS
    text += f"; the largest {MAX_PANELS} of {len(summary.sources)} sources are drawn." if many else "."
    drawn = [source for source in summary.sources if source.histogram is not None]
    return Selection(
        text=text,
        panels=tuple(_delta_panel(index, source) for index, source in enumerate(drawn)),
        scatter=_scatter(summary),
        groups=groups,
    )


def _delta_panel(index: int, source: SourceSummary) -> Panel:
    assert source.histogram is not None
    boundary = "" if source.from_delta is None else f"; kept from delta {source.from_delta:+.3g} on"
    text = f"{source.kept:,} of {source.scored:,} kept{boundary}"
    alt = f"Histogram of delta for {source.name}: {text}"
    svg = plots.delta_histogram(source.histogram, name=f"delta{index}", alt=alt)
    return Panel(title=source.name, svg=svg, text=text)


def _scatter(summary: ScoreSummary) -> Panel:
    text = f"Below the dashed line the large scorer is the better one: {summary.below:,} of {summary.scored:,} samples."
    alt = f"Scatter of the two scorers' losses. {text}"
    svg = plots.likelihood_scatter(summary.points, name="scatter", alt=alt)
    return Panel(title="Both scorers", svg=svg, text=text)
