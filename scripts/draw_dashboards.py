"""Draw the dashboards of charts/nvila-observability from what a Prometheus answers, without Grafana.

A PNG for each dashboard, each panel where the dashboard has it: numbers for `stat` and `gauge`, lines for `timeseries`,
rows for the rest. A query without an answer says `no data`, as Grafana does. The pictures of docs/ are made
by it in tests/charts/test_dashboards_answer.py, from a real server and a real Prometheus.

Usage:
    python scripts/draw_dashboards.py --prometheus http://127.0.0.1:9090 --var model_name=nvila --var namespace=models
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
DASHBOARDS = ROOT / "charts" / "nvila-observability" / "files" / "dashboards"
UNITS = {
    "s": "s",
    "dtdurations": "s",
    "bytes": "B",
    "joule": "J",
    "percentunit": "%",
    "currencyUSD": "$",
    "reqps": "/s",
}
GRID = 24
# Inches of a column and of a row of Grafana's grid.
COLUMN, ROW = 0.55, 0.3
INK, FAINT = "#1f2933", "#9aa5b1"
_TIMEOUT_S = 30
Panel = Mapping[str, Any]
Series = tuple[str, list[tuple[float, float]]]


class DrawError(Exception):
    """A reason that fits on one line."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Draw the dashboards from what a Prometheus answers.")
    parser.add_argument("--prometheus", required=True, metavar="URL", help="its address")
    parser.add_argument("--dest", type=Path, default=ROOT / "docs" / "images", help="folder (default: docs/images)")
    parser.add_argument("--minutes", type=float, default=60.0, help="how far back (default: 60)")
    parser.add_argument("--interval", default="5m", help="what $__rate_interval is (default: 5m)")
    parser.add_argument(
        "--var", action="append", default=[], metavar="NAME=VALUE", help="a variable (default: any value)"
    )
    args = parser.parse_args(argv)
    variables = dict(word.split("=", 1) for word in args.var) | {"__rate_interval": args.interval}
    args.dest.mkdir(parents=True, exist_ok=True)
    try:
        for path in sorted(DASHBOARDS.glob("*.json")):
            dashboard = json.loads(path.read_text(encoding="utf-8"))
            picture = args.dest / f"dashboard-{path.stem}.png"
            drawn, empty = draw(dashboard, args.prometheus, variables, args.minutes * 60, picture)
            print(f"{picture}: {drawn} panels drawn, {len(empty)} without data" + "".join(f"; {one}" for one in empty))
    except DrawError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def draw(
    dashboard: Mapping[str, Any], address: str, variables: Mapping[str, str], seconds: float, picture: Path
) -> tuple[int, list[str]]:
    """Draw one dashboard; returns how many panels have data, and the titles of the others.

    Raises:
        DrawError: Prometheus does not answer, or refuses a query.
    """
    from matplotlib.figure import Figure

    panels: list[Panel] = dashboard["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure(figsize=(GRID * COLUMN, (height + 2) * ROW), facecolor="white")
    figure.text(0.01, 1 - 0.8 / (height + 2), dashboard["title"], size=13, weight="bold", color=INK, va="center")
    drawn, empty = 0, []
    for panel in panels:
        place = panel["gridPos"]
        top = 1 - (place["y"] + 2) / (height + 2)
        if panel["type"] == "row":
            figure.text(0.01, top - 0.5 / (height + 2), panel["title"], size=10, color=INK, weight="bold", va="center")
            continue
        if not panel.get("targets"):
            continue
        found = [one for target in panel["targets"] for one in answers(panel, target, address, variables, seconds)]
        found = [one for one in found if any(math.isfinite(value) for _, value in one[1])]
        axes = figure.add_axes(_rectangle(place, top, height))
        _panel(axes, panel, found)
        drawn += bool(found)
        empty += [] if found else [panel["title"]]
    figure.savefig(picture, dpi=90)
    return drawn, empty


def _rectangle(place: Mapping[str, int], top: float, height: int) -> tuple[float, float, float, float]:
    """Return left, bottom, width and height of a panel in parts of the figure, with room for its title and axes."""
    small = place["h"] <= 4
    left, below, above = (0.15, 0.3, 1.2) if small else (1.1, 1.6, 1.2)
    rows = height + 2
    return (
        (place["x"] + left) / GRID,
        top - (place["h"] - below) / rows,
        (place["w"] - left - 0.4) / GRID,
        (place["h"] - below - above) / rows,
    )


def answers(
    panel: Panel, target: Mapping[str, Any], address: str, variables: Mapping[str, str], seconds: float
) -> list[Series]:
    """Ask for one target: `(name, [(time, value)])` for each series, over time where the panel shows time."""
    now = time.time()
    query = filled(target["expr"], variables)
    asked: dict[str, str] = {"query": query}
    over_time = panel["type"] == "timeseries"
    if over_time:
        asked |= {"start": f"{now - seconds}", "end": f"{now}", "step": f"{max(1.0, seconds / 240)}"}
    url = f"{address}/api/v1/query{'_range' if over_time else ''}?{urllib.parse.urlencode(asked)}"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - the caller's own address
            result = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        with error:
            raise DrawError(f"{panel['title']}: {query}: {json.load(error)['error']}") from error
    except (OSError, ValueError) as error:
        raise DrawError(f"{address} does not answer: {error}") from error
    return [
        (
            _name(target, one["metric"]),
            [(float(at), float(value)) for at, value in one.get("values", [one.get("value")])],
        )
        for one in result
    ]


def filled(query: str, variables: Mapping[str, str]) -> str:
    """Put values into Grafana's `$name`; a name without one matches anything."""
    return re.sub(r"\$(\w+)", lambda name: variables.get(name[1], ".*"), query)


def _name(target: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    legend = target.get("legendFormat") or ""
    if not legend or legend == "__auto":
        return ", ".join(value for key, value in labels.items() if key != "__name__")
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda name: labels.get(name[1], ""), legend)


def _panel(axes: Axes, panel: Panel, found: list[Series]) -> None:
    axes.set_title(panel["title"], loc="left", size=8, color=INK, pad=3)
    axes.tick_params(labelsize=6, colors=INK, length=2)
    for side in axes.spines.values():
        side.set_color(FAINT)
        side.set_linewidth(0.5)
    unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "")
    if not found or panel["type"] in ("stat", "gauge"):
        axes.set_xticks([])
        axes.set_yticks([])
        words = [f"{name} {shown(points[-1][1], unit)}".strip() for name, points in found[:3]]
        size = 14 if len(words) == 1 else 9
        text = "\n".join(words) or "no data"
        axes.text(0.5, 0.5, text, size=size, color=INK if found else FAINT, ha="center", va="center")
        return
    if panel["type"] == "timeseries":
        _lines(axes, found, unit)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        rows = [f"{name[:60]}  {shown(points[-1][1], unit)}" for name, points in found[:12]]
        axes.text(0.02, 0.95, "\n".join(rows), size=6.5, color=INK, ha="left", va="top")


def _lines(axes: Axes, found: list[Series], unit: str) -> None:
    end = max(points[-1][0] for _, points in found)
    for name, points in found[:8]:
        axes.plot([(at - end) / 60 for at, _ in points], [value for _, value in points], linewidth=1, label=name[:40])
    low, high = axes.get_ylim()
    # Room above for the names.
    axes.set_ylim(min(0.0, low), high + 0.25 * (high - min(0.0, low)))
    axes.grid(visible=True, color="#e4e7eb", linewidth=0.5)
    axes.xaxis.set_major_formatter(lambda minutes, _: f"{minutes:g} min")
    axes.xaxis.set_major_locator(_few())
    axes.yaxis.set_major_formatter(lambda value, _: shown(value, unit))
    if any(name for name, _ in found):
        axes.legend(fontsize=5.5, frameon=False, loc="upper left", labelspacing=0.2)


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def shown(value: float, unit: str) -> str:
    """Return a number as people read it: `1.2 k`, `35 %`, `$ 0.42`, `12 ms`."""
    if not math.isfinite(value):
        return "-"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    mark = UNITS.get(unit, "")
    if unit.startswith("currency"):
        return f"{mark or '$'} {value:,.4g}"
    if mark == "s" and 0 < abs(value) < 1:
        return f"{1000 * value:.3g} ms"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{mark}".strip()
    return f"{value:.3g} {mark}".strip()


if __name__ == "__main__":
    sys.exit(main())
