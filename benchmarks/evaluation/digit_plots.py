"""Draw what the digit benchmarks found as one picture of the documentation: accuracy over tiling, compression, frames.

python benchmarks/evaluation/digit_plots.py    # reads benchmarks/results/, writes docs/images/digits.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "digits.svg"
INK, MUTED, LINE, BARS = "#1b2430", "#566270", "#dde3e9", "#2563a8"

# Claim of a result file, and what stands below its bar.
PAGES = {
    "single-2x2-corner": "1 tile of 48 px\n2x2, 9 tokens",
    "s2-3x3-corner": "S2 up to 144 px\n3x3, 36 tokens",
    "s2-2x2-corner": "S2 up to 144 px\n2x2, 81 tokens",
}
CLIPS = {
    "digit-clips-8": "8 frames\n16 tokens",
    "digit-clips-32-pooled": "32 frames, pooled\n16 tokens",
    "digit-clips-32": "32 frames\n64 tokens",
}


def main() -> int:
    """Draw."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # A fixed salt and no date: the same results give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "digits", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(8.6, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        left, right = figure.subplots(1, 2)
        bars(left, claims("evaluation-digit-pages"), PAGES, "Small digits on pages: which is at the ...?")
        bars(right, claims("evaluation-digit-clips"), CLIPS, "Digits in clips: order and number")
        figure.savefig(PICTURE, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    print(f"written: {PICTURE.relative_to(ROOT)}")
    return 0


def claims(name: str) -> dict[str, Any]:
    """Return the claims of a result file by their ids."""
    raw = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return {claim["id"]: claim for claim in raw["claims"]}


def bars(axes: Any, found: dict[str, Any], labels: dict[str, str], title: str) -> None:
    """Draw a bar for every claim that was measured, with the range over seeds."""
    shown = [(found[name], label) for name, label in labels.items() if name in found]
    for place, (claim, _) in enumerate(shown):
        value, low, high = (claim[key] for key in ("ratio", "low", "high"))
        axes.bar(place, value, width=0.6, color=BARS, yerr=[[value - low], [high - value]] if high > low else None)
        axes.text(place, high + 1.5, f"{value:.1f}%", ha="center", color=INK)
    axes.set_xticks(range(len(shown)), [label for _, label in shown], color=INK)
    axes.set(ylim=(0, 105), ylabel="right answers, percent")
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(color=MUTED, labelcolor=MUTED)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    sys.exit(main())
