"""Two evaluations side by side: from what the command names to the comparison and its page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila_pipelines.evaluation.sides import side_names
from nvila_platform.artifacts import storage_errors, write_atomically

if TYPE_CHECKING:
    from nvila.evaluation.comparison import Difference, TaskComparison
    from nvila.evaluation.sample_logs import Logged
    from nvila_platform.settings import Settings

FILE, PAGE = "comparison.json", "comparison.html"
_HEAD = ("task", "metric", "A", "B", "B - A", "95% interval", "p", "worse", "better", "samples")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two models on some tasks.

    Args:
        names: What A and B are called.
        sides: A, the reference, and B, the candidate.
        tasks: Every task that both have.
    """

    names: tuple[str, str]
    sides: tuple[Logged, Logged]
    tasks: Mapping[str, TaskComparison]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            letter: {"name": name, "digest": side.results.get("model_digest"), "results": str(side.file)}
            for letter, name, side in zip(("a", "b"), self.names, self.sides, strict=True)
        } | {"tasks": {name: _task(task) for name, task in self.tasks.items()}}


def compare_sides(reference: Logged, candidate: Logged, *, seed: int) -> Comparison:
    """Compare two evaluations.

    Raises:
        ConfigError: They share no task, or a task is of two versions.
        DataError: They share no sample of a task.
    """
    from nvila.evaluation.comparison import compare

    return Comparison(
        names=side_names(reference, candidate),
        sides=(reference, candidate),
        tasks=compare(reference, candidate, seed=seed),
    )


def write_comparison(comparison: Comparison, out: Path, settings: Settings, data: Mapping[str, str]) -> Path:
    """Write the comparison and its page into a folder of its own, and return the page.

    Args:
        comparison: The comparison.
        out: Where the folder is made.
        settings: Where data in an object store are.
        data: Places of data by task, for pictures; where none is given, the place that the evaluation names.

    Raises:
        ResourceError: The disk is full.
    """
    from nvila_pipelines.report.comparison_report import comparison_page

    folder = out / _UNSAFE.sub("_", f"{comparison.names[0]}-vs-{comparison.names[1]}")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILE, json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False) + "\n")
        write_atomically(folder / PAGE, comparison_page(comparison, settings, data))
    return folder / PAGE


def comparison_lines(comparison: Comparison) -> list[str]:
    """Return the table of a comparison: the metrics of every task, the main one also by category."""
    rows: list[tuple[str, ...]] = [_HEAD]
    for task in comparison.tasks.values():
        name = task.task
        for metric, difference in task.metrics.items():
            rows.append((name, metric, *_cells(difference)))
            if metric == task.main:
                rows += [(f"  {group}", metric, *_cells(found)) for group, found in task.categories.items()]
            name = ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return [
        "  ".join(
            cell.ljust(w) if n < 2 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def verdict_lines(comparison: Comparison) -> list[str]:
    """Return a sentence for every task: what the comparison shows about B."""
    lines = []
    for task in comparison.tasks.values():
        paired = task.difference.paired
        lines.append(
            f"{task.task}: {comparison.names[1]} {_said(task.difference)} "
            f"({task.main} {paired.difference:+.4f}, p {paired.p_value:.3g})"
        )
        if task.only_reference or task.only_candidate:
            lines.append(
                f"  not compared: {task.only_reference} samples with a score of A alone, "
                f"{task.only_candidate} of B alone"
            )
    return lines


def left_out_lines(comparison: Comparison) -> list[str]:
    """Return a line for every task that one side has no result of, with the reason where the side says it."""
    lines = []
    for letter, side, other in zip("AB", comparison.sides, reversed(comparison.sides), strict=True):
        skipped = side.results.get("skipped", {})
        lines += [f"{name}: not compared, {letter} skipped it: {why}" for name, why in skipped.items()]
        missing = [name for name in other.tasks if name not in side.tasks and name not in skipped]
        lines += [f"{name}: not compared, {letter} has no result of it" for name in missing]
    return lines


def _said(difference: Difference) -> str:
    return {"better": "is better", "worse": "is worse"}.get(difference.verdict, "shows no difference")


def _cells(difference: Difference) -> tuple[str, ...]:
    paired = difference.paired
    interval = "-" if math.isnan(paired.low) else f"{paired.low:+.4f} - {paired.high:+.4f}"
    return (
        f"{difference.reference:.4f}",
        f"{difference.candidate:.4f}",
        f"{paired.difference:+.4f}",
        interval,
        f"{paired.p_value:.3g}",
        f"{paired.worse:,}",
        f"{paired.better:,}",
        f"{difference.samples:,}",
    )


def _task(task: TaskComparison) -> dict[str, Any]:
    return {
        "main": task.main,
        "verdict": task.difference.verdict,
        "metrics": {name: _difference(found) for name, found in task.metrics.items()},
        "categories": {name: _difference(found) for name, found in task.categories.items()},
        "not_compared": {"a": task.only_reference, "b": task.only_candidate},
        "flipped": {
            kind: [
                {"id": a.id, "index": a.index, "prompt": a.prompt, "target": a.target, "a": a.answer, "b": b.answer}
                for a, b in pairs
            ]
            for kind, pairs in (("worse", task.worse), ("better", task.better))
        },
    }


def _difference(difference: Difference) -> dict[str, Any]:
    values = asdict(difference.paired)
    found = {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in values.items()}
    return {"samples": difference.samples, "a": difference.reference, "b": difference.candidate, **found}
