"""The table that an evaluation prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvila.evaluation.results import TaskResult

_HEAD = ("task", "metric", "value", "95% interval", "stderr", "samples")


def result_lines(results: Sequence[TaskResult]) -> list[str]:
    """Return one line for every metric, under a head; the categories of a task follow its main metric.

    Args:
        results: Tasks with their scores.
    """
    rows = [_HEAD]
    for result in results:
        name, count = result.task.name, f"{len(result.outcome.scored):,}"
        for metric, estimate in result.estimates.items():
            interval = "-" if math.isnan(estimate.low) else f"{estimate.low:.4f} - {estimate.high:.4f}"
            stderr = "-" if math.isnan(estimate.stderr) else f"{estimate.stderr:.4f}"
            rows.append((name, metric, f"{estimate.value:.4f}", interval, stderr, count))
            if metric == result.task.scorer.main:
                for group, (members, values) in result.categories.items():
                    value = f"{values[metric]:.4f}" if metric in values else "-"
                    rows.append((f"  {group}", metric, value, "", "", f"{members:,}"))
            name = count = ""
    return aligned(rows)


def skipped_lines(skipped: Mapping[str, str]) -> list[str]:
    """Return a line for every task that the model cannot be asked, with the reason.

    Args:
        skipped: The reason by task.
    """
    return [f"{name}  skipped: {why}" for name, why in skipped.items()]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with columns below each other, the first two to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
