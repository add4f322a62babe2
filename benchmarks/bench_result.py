"""The result file of a benchmark: what was claimed, what was measured, on what."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("torch", "transformers", "deepspeed", "torchao", "kfp", "mlflow", "kserve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One measured figure: the median of repeats in `ratio`, their range in `low` and `high`.

    Args:
        id: Stable name.
        what: What was measured, with its unit.
        ratio: Median.
        low: Smallest repeat.
        high: Largest repeat.
        goal: What it should be, in words.
        met: Whether the goal was reached.
        notes: How it was measured and why it fell short, if it did.
    """

    id: str
    what: str
    ratio: float
    low: float
    high: float
    goal: str
    met: bool
    notes: str = ""


def claim(id: str, what: str, values: Sequence[float], goal: str, met: bool, notes: str = "") -> Claim:
    """Build a claim from repeats."""
    digits = 4
    return Claim(
        id=id,
        what=what,
        ratio=round(median(values), digits),
        low=round(min(values), digits),
        high=round(max(values), digits),
        goal=goal,
        met=met,
        notes=notes,
    )


def write_result(name: str, claims: Sequence[Claim], details: Mapping[str, Any]) -> Path:
    """Write `benchmarks/results/<name>.json` and return its path.

    Args:
        name: `<area>-<name>`, with `-<hardware>` where that matters.
        claims: The figures.
        details: Single measurements behind them.
    """
    result = {
        "command": shlex.join(["python", _script(), *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {package: _version(package) for package in _PACKAGES} | {"python": platform.python_version()},
        "hardware": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "claims": [asdict(one) for one in claims],
        "details": dict(details),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def _script() -> str:
    """Return the program as a reader starts it, from wherever it was started here."""
    path = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parents[1]
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else sys.argv[0]
