"""The page of `nvila drift report`: every feature's distribution, then and now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nvila_pipelines.drift import by_drift
from nvila_platform.artifacts import write_atomically
from nvila_platform.drift.features import FEATURES
from nvila_platform.drift.watch import verdict

TEMPLATE = "drift.html.j2"
_WIDTH, _HEIGHT, _GAP = 300.0, 110.0, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One feature.

    Args:
        name: Its name.
        meaning: What it is.
        verdict: In a word.
        psi: The index as text.
        seen: Values in the window.
        svg: Shares of the bins, before and now.
        low: Lowest edge as text.
        high: Highest edge as text.
    """

    name: str
    meaning: str
    verdict: str
    psi: str
    seen: int
    svg: str
    low: str
    high: str


def write_drift_page(url: str, summary: Mapping[str, Any], path: Path) -> None:
    """Write one HTML file that needs no network.

    Args:
        url: The endpoint.
        summary: As `read_summary` returns it.
        path: File to write; its folder is made.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(TEMPLATE).render(
        url=url,
        summary=summary,
        panels=[_panel(name, found) for name, found in by_drift(summary)],
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def _panel(name: str, found: Mapping[str, Any]) -> Panel:
    meaning = FEATURES.get(name, name)
    return Panel(
        name=name,
        meaning=meaning,
        verdict=verdict(found["psi"]),
        psi="-" if found["psi"] is None else f"{found['psi']:.3f}",
        seen=found["seen"],
        svg=_bars(found["reference"], found["now"], f"{meaning}: shares of {len(found['now'])} bins, before and now"),
        low=f"below {found['edges'][0]:.3g}",
        high=f"{found['edges'][-1]:.3g} and above",
    )


def _bars(before: Sequence[int], now: Sequence[int], alt: str) -> str:
    """Draw two bars a bin, side by side, on one scale."""
    from markupsafe import escape

    shares = [[count / max(sum(counts), 1) for count in counts] for counts in (before, now)]
    top = max(max(shares[0]), max(shares[1]), 1e-9)
    step = _WIDTH / len(before)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" '
        f'aria-label="{escape(alt)}">'
    ]
    for row, kind in enumerate(("before", "now")):
        for place, share in enumerate(shares[row]):
            height = _HEIGHT * share / top
            left = place * step + _GAP + row * (step - 2 * _GAP) / 2
            parts.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{_HEIGHT - height:.1f}" width="{(step - 2 * _GAP) / 2:.1f}" '
                f'height="{height:.1f}"/>'
            )
    return "".join([*parts, "</svg>"])
