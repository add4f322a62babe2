"""The report of a tuning: one page with its plots, no network."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nvila_pipelines.tuning.plots import loss_plot, ratio_plot

REPORT = "report.html"
_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1b2430, #e6ebf0); --line: light-dark(#dde3e9, #39434d); }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; }
img { max-width: 100%; background: #fff; }
"""


def write_report(out: Path, summary: Mapping[str, Any], cache: Path) -> Path:
    """Write the report and return its path.

    Args:
        out: Folder of the artifact.
        summary: What `summary.json` holds.
        cache: Where matplotlib keeps its fonts.
    """
    parts = [f"<h1>Tuned with {html.escape(summary['name'])}</h1>", _overview(summary)]
    parts += ["<h2>Scores</h2>", _scores(summary)]
    if summary["losses"]:
        parts += ["<h2>Held-out loss</h2>", _image(loss_plot(summary["losses"], summary["best_step"], cache), "loss")]
    if summary["ratios"]:
        parts += ["<h2>Learning-rate ratio</h2>", _image(ratio_plot(summary["ratios"], cache), "ratio")]
        rows = [(f"{one['ratio']:g}", f"{one['loss']:.4f}", one["steps"]) for one in summary["ratios"]]
        parts.append(_table(("LLM : ViT", "held-out loss", "steps"), rows))
    if summary["examples"]:
        rows = [(one["question"], one["wanted"], one["said"]) for one in summary["examples"]]
        parts += ["<h2>Held-out answers</h2>", _table(("question", "wanted", "said"), rows)]
    path = out / REPORT
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Tuning</title><style>{_STYLE}</style><body>'
        + "".join(parts)
        + "</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")
    return path


def _overview(summary: Mapping[str, Any]) -> str:
    rates = summary["rates"]
    rows = [
        (part, f"{one['total']:,}", f"{one['trained']:,}", f"{rates[part]:.3g}" if part in rates else "frozen")
        for part, one in summary["parts"].items()
    ]
    samples = summary["samples"]
    text = f"{samples['train']:,} samples, {samples['held_out']:,} held out, {samples['set_aside']:,} set aside."
    return f"<p>{text}</p>" + _table(("part", "parameters", "learn", "learning rate"), rows)


def _scores(summary: Mapping[str, Any]) -> str:
    scores = summary["scores"]
    rows = []
    for name, after in scores["after"].items():
        before = scores["before"].get(name)
        kind = "guard" if name in scores["guard"] else summary["scorer"] if name == "held_out" else "task"
        rows.append((name, kind, "-" if before is None else f"{before:.3f}", f"{after:.3f}"))
    return _table(("on", "", "before", "after"), rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def _image(data: str, name: str) -> str:
    return f'<img alt="{name}" src="data:image/png;base64,{data}">'
