"""Plots as SVG text that takes its colours and font from the page, so one file serves light, dark and print.

Figures are drawn with placeholder colours; the SVG then names CSS variables in their place. No text from data goes into
a figure: titles and captions are HTML, where they are escaped.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nvila_pipelines.report.kept_figures import kept, kept_in
from nvila_pipelines.report.score_summary import DeltaHistogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

X = TypeVar("X", int, float)

INK, MUTED, FAINT = "#010101", "#010102", "#010103"
KEPT, IGNORED, MARK = "#010104", "#010105", "#010106"
_VARIABLES = {INK: "ink", MUTED: "muted", FAINT: "line", KEPT: "kept", IGNORED: "ignored", MARK: "mark"}
# As in style.css.
_LIGHT = {
    "bg": "#ffffff",
    "ink": "#1b2430",
    "muted": "#566270",
    "line": "#dde3e9",
    "kept": "#2563a8",
    "ignored": "#c98a1b",
    "mark": "#b3261e",
}
_LEGEND: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": 8.5, "handlelength": 1.4}
_FONT_SIZE = 10.5


_CACHE: ContextVar[Path | None] = ContextVar("cache", default=None)


@contextmanager
def cached_in(directory: Path | None) -> Iterator[None]:
    """Keep figures in this directory, and matplotlib's font list, which would go to the home directory.

    A run writes nothing outside its workspace. A user's own MPLCONFIGDIR wins.
    """
    token = _CACHE.set(directory)
    try:
        with kept_in(None if directory is None else directory / "figures"):
            yield
    finally:
        _CACHE.reset(token)


@kept
def loss_curve(curve: Sequence[tuple[int, float]], limits: tuple[float, float], *, name: str, alt: str) -> str:
    """Draw (step, loss) of one training stage on a logarithmic scale that all stages share.

    Args:
        curve: Points in order; those that are not finite and positive are left out.
        limits: Lowest and highest loss on the scale.
        name: Unique within the page; keeps the identifiers of several figures apart.
        alt: What the figure shows, for readers who cannot see it.
    """
    shown = _thinned([(step, loss) for step, loss in curve if math.isfinite(loss) and loss > 0])

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        axes.plot([step for step, _ in shown], [loss for _, loss in shown], color=KEPT, linewidth=1.8)
        axes.set_yscale("log")
        axes.set_ylim(limits[0] / 1.3, limits[1] * 1.3)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        _plain_decades(axes, limits)

    return _svg(draw, (3.0, 2.2), name, alt)


@kept
def training_curve(
    curve: Sequence[tuple[float, float]],
    marks: Sequence[float],
    *,
    labels: tuple[str, str],
    name: str,
    alt: str,
) -> str:
    """Draw one measurement of a training stage, from zero on, with a mark where a step was skipped.

    Args:
        curve: Points in order; those that are not finite are left out.
        marks: Where on the horizontal axis steps were skipped.
        labels: Of the horizontal and the vertical axis.
        name: Unique within the page.
        alt: What the figure shows, for readers who cannot see it.
    """
    shown = _thinned([(x, y) for x, y in curve if math.isfinite(y)])
    top = max((y for _, y in shown), default=1.0) or 1.0

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes.plot([x for x, _ in shown], [y for _, y in shown], color=KEPT, linewidth=1.6)
        if marks:
            axes.plot(list(marks), [0.03 * top] * len(marks), linestyle="none", marker="x", color=MARK, label="skipped")
            axes.legend(**_LEGEND, loc="lower right", bbox_to_anchor=(1.02, 0.96))
        axes.set_ylim(0, top * 1.15)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain_number(value)))
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])

    return _svg(draw, (3.0, 2.2), name, alt, headroom=0.2)


@kept
def delta_histogram(histogram: DeltaHistogram, *, name: str, alt: str) -> str:
    """Draw how delta is distributed, with the boundary between kept and ignored samples."""
    low, high, below, above = histogram.low, histogram.high, histogram.ignored, histogram.kept
    wide = (high - low) / len(below)
    edges = [low + wide * number for number in range(len(below))]

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        axes.bar(edges, below, wide, align="edge", color=IGNORED, hatch="/////", edgecolor=FAINT, lw=0, label="ignored")
        axes.bar(edges, above, wide, bottom=below, align="edge", color=KEPT, lw=0, label="kept")
        if histogram.boundary is not None:
            axes.axvline(histogram.boundary, color=MARK, linewidth=1.5, linestyle="--", label="boundary")
        axes.set_yscale("symlog", linthresh=10)
        axes.set_xlabel("delta")
        axes.set_ylabel("samples (log)")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
        axes.minorticks_off()
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.legend(**_LEGEND, loc="lower center", bbox_to_anchor=(0.45, 0.98), ncols=3, columnspacing=1)

    return _svg(draw, (3.0, 2.4), name, alt, headroom=0.24)


@kept
def likelihood_scatter(points: Sequence[tuple[float, float, bool]], *, name: str, alt: str) -> str:
    """Draw (NLL of the small scorer, NLL of the large scorer, kept)."""
    top = max(_quantile(sorted(max(small, large) for small, large, _ in points), 0.995), 1e-3) * 1.05

    def draw(axes: Axes) -> None:
        axes.axline((0, 0), (top, top), color=MUTED, linewidth=1, linestyle="--", label="equally likely to both")
        for is_kept, color, marker, label in ((False, IGNORED, "x", "ignored"), (True, KEPT, "o", "kept")):
            chosen = [(min(small, top), min(large, top)) for small, large, was_kept in points if was_kept == is_kept]
            axes.plot(
                [small for small, _ in chosen],
                [large for _, large in chosen],
                linestyle="none",
                marker=marker,
                markersize=3.2,
                markeredgewidth=0.8,
                color=color,
                alpha=0.55,
                label=label,
            )
        axes.set(xlim=(-0.02 * top, top * 1.02), ylim=(-0.02 * top, top * 1.02), aspect="equal")
        axes.set_xlabel("loss of the small scorer")
        axes.set_ylabel("loss of the large scorer")
        axes.legend(**_LEGEND, loc="upper left")

    return _svg(draw, (5.0, 4.6), name, alt)


@kept
def category_scatter(points: Sequence[tuple[float, float, str]], *, name: str, alt: str) -> str:
    """Draw (value of A, value of B, verdict) of every category, with the line on which both are equal."""
    values = [value for a, b, _ in points for value in (a, b) if math.isfinite(value)]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05
    looks = (("none", MUTED, "o", "no difference"), ("worse", MARK, "v", "B worse"), ("better", KEPT, "^", "B better"))

    def draw(axes: Axes) -> None:
        axes.axline((low, low), slope=1, color=MUTED, linewidth=1, linestyle="--")
        for verdict, color, marker, label in looks:
            chosen = [(a, b) for a, b, v in points if (v if v in ("worse", "better") else "none") == verdict]
            if chosen:
                x, y = zip(*chosen, strict=True)
                axes.plot(x, y, linestyle="none", marker=marker, markersize=5, color=color, label=label)
        axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
        axes.set_xlabel("A")
        axes.set_ylabel("B")
        axes.legend(**_LEGEND, loc="lower right")

    return _svg(draw, (4.2, 3.8), name, alt)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPoint:
    """A point of a Pareto front's plot: its cost and score, the score's interval, and what it is."""

    cost: float
    score: float
    low: float | None
    high: float | None
    on_front: bool
    chosen: bool


@kept
def front_scatter(points: Sequence[FrontPoint], *, axes: tuple[str, str], name: str, alt: str) -> str:
    """Draw points by cost and score, the line of those that no other one beats, and the chosen one in a ring."""
    looks = ((False, MUTED, 3.5, "beaten"), (True, KEPT, 5.0, "Pareto front"))

    def draw(axis: Axes) -> None:
        for on_front, color, size, label in looks:
            shown = [point for point in points if point.on_front == on_front]
            for point in shown:
                if point.low is not None and point.high is not None:
                    axis.plot([point.cost] * 2, [point.low, point.high], color=color, linewidth=0.8, alpha=0.6)
            if shown:
                shown.sort(key=lambda point: point.cost)
                x, y = [point.cost for point in shown], [point.score for point in shown]
                line = "-" if on_front else "none"
                axis.plot(
                    x, y, linestyle=line, drawstyle="steps-post", marker="o", markersize=size, color=color, label=label
                )
        chosen = [point for point in points if point.chosen]
        axis.plot(
            [point.cost for point in chosen],
            [point.score for point in chosen],
            linestyle="none",
            marker="o",
            markersize=11,
            markerfacecolor="none",
            markeredgewidth=1.6,
            color=MARK,
            label="recommended",
        )
        axis.set_xlim(left=0)
        axis.set_xlabel(axes[0])
        axis.set_ylabel(axes[1])
        axis.legend(**_LEGEND, loc="lower center", bbox_to_anchor=(0.45, 0.98), ncols=3, columnspacing=1)

    return _svg(draw, (4.2, 3.3), name, alt, headroom=0.26)


def standalone(svg: str) -> str:
    """Turn a plot of the page into a file of its own, in the page's light colours."""
    for variable, color in _LIGHT.items():
        svg = svg.replace(f"var(--{variable})", color)
    return svg.replace("<svg ", f'<svg style="background:{_LIGHT["bg"]};font-family:sans-serif" ', 1)


def loss_limits(curves: Mapping[str, Sequence[tuple[int, float]]]) -> tuple[float, float]:
    """Return the lowest and highest loss of all curves, for a scale that they share."""
    losses = [loss for curve in curves.values() for _, loss in curve if math.isfinite(loss) and loss > 0]
    return (max(min(losses), 1e-6), max(losses)) if losses else (0.1, 1.0)


def _svg(draw: Callable[[Axes], None], inches: tuple[float, float], name: str, alt: str, headroom: float = 0.08) -> str:
    _import_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # A fixed salt and no date: the same run gives the same bytes. Text stays text, so the page's font applies.
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": _FONT_SIZE,
        "hatch.color": FAINT,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=inches)
        # Fixed margins: measuring every label first would double the time, and all labels here are short.
        width, height = inches
        figure.subplots_adjust(left=0.68 / width, right=1 - 0.1 / width, bottom=0.5 / height, top=1 - headroom / height)
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        draw(axes)
        _restrained(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Type")))
    return _inlined(out.getvalue(), name, alt)


def _import_matplotlib() -> None:
    directory = _CACHE.get()
    own = directory is not None and "MPLCONFIGDIR" not in os.environ
    if own:
        os.environ["MPLCONFIGDIR"] = str(directory)
    try:
        import matplotlib.font_manager  # noqa: F401  # reads the variable on import and remembers the answer
    finally:
        if own:
            del os.environ["MPLCONFIGDIR"]


def _restrained(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(which="both", color=MUTED, labelcolor=MUTED)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)


def _plain_decades(axes: Axes, limits: tuple[float, float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    powers = range(math.floor(math.log10(limits[0])), math.ceil(math.log10(limits[1])) + 1)
    axes.yaxis.set_major_locator(FixedLocator([10.0**power for power in powers]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _inlined(svg: str, name: str, alt: str) -> str:
    """Turn a stand-alone SVG into an element of the page: no global styles, unique identifiers, page colours."""
    from markupsafe import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' width="[^"]*pt" height="[^"]*pt"', f' role="img" aria-label="{escape(alt)}"', svg, count=1)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'(id="|href="#|url\(#)', lambda match: f"{match[0]}{name}-", svg)
    svg = re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return re.sub(r"\s*\n\s*", "\n", svg)


def _plain_number(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _thinned(curve: list[tuple[X, float]], limit: int = 400) -> list[tuple[X, float]]:
    thin = curve[:: max(1, math.ceil(len(curve) / limit))]
    return thin + curve[-1:] if curve and thin[-1] != curve[-1] else thin


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
