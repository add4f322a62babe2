"""The table that a run ends with on the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila_pipelines.report.formats import MISSING, amount, duration, percent, points, size, step_time

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_BAR_WIDTH = 24


def render_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print accuracy, sizes, latency, times, the report's path and what to type next.

    Args:
        summary: What the run returned; parts that are missing (a refused run has no served model) are left out.
            "sizes" may hold what `sizes.json` holds.
        console: Where to print; its width and colours are respected.
    """
    from rich.text import Text

    passed = summary.get("passed")
    word = "unfinished" if passed is None else "passed" if passed else "refused"
    style = "bold green" if passed else "bold red"
    run_id, seconds = str(summary.get("run_id", MISSING)), duration(summary.get("seconds"))
    console.print(Text.assemble(("Gate: ", "bold"), (word, style), f"   run {run_id}   {seconds}"))
    console.print(_accuracy(summary))
    console.print(_times(summary))
    if used := used_text(summary.get("usage") or {}):
        console.print(Text.assemble(("Used:   ", "bold"), used), soft_wrap=True)
    if summary.get("report"):
        console.print(Text.assemble(("Report: ", "bold"), str(summary["report"])), soft_wrap=True)
    if summary.get("model"):
        console.print(Text.assemble(("Model:  ", "bold"), str(summary["model"])), soft_wrap=True)
    console.print(Text("Next:", "bold"))
    for command, purpose in next_commands(summary):
        console.print(Text.assemble("  ", (command, "cyan"), f"   # {purpose}"), soft_wrap=True)


def used_text(usage: Mapping[str, float]) -> str:
    """Return hours, energy and money of a run in words.

    Example:
        >>> used_text({"core_hours": 0.05, "energy_kwh_estimated": 0.001, "cost_eur": 0.02})
        '0.05 core-hours, 0.001 kWh (estimated), 0.02 EUR'
    """
    hours = [f"{amount(usage[name])} {name.replace('_', '-')}" for name in ("gpu_hours", "core_hours") if name in usage]
    energy = [
        f"{amount(value)} kWh ({name.removeprefix('energy_kwh_')})"
        for name, value in usage.items()
        if name.startswith("energy_kwh_")
    ]
    money = [
        f"{amount(value)} {name.removeprefix('cost_').upper()}"
        for name, value in usage.items()
        if name.startswith("cost_")
    ]
    return ", ".join([*hours, *energy, *money])


def next_commands(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return commands worth typing after this run, each with its purpose."""
    workspace = summary.get("workspace")
    # The workspace that a command typed here finds by itself need not be named.
    usual = workspace is None or Path(workspace).resolve() == Path("nvila-workspace").resolve()
    where = "" if usual else f" --workspace {shlex.quote(str(workspace))}"
    commands = [(f"nvila ui{where}", "look at the run's metrics in MLflow")]
    if summary.get("passed") and summary.get("model"):
        commands.insert(0, (f"nvila serve {shlex.quote(str(summary['model']))}{where}", "leave the endpoint up"))
    return commands


def _accuracy(summary: Mapping[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    accuracy, served = summary.get("accuracy") or {}, summary.get("served") or {}
    wide, quantized = accuracy.get("wide"), accuracy.get("quantized")
    change = points(quantized - wide) if wide is not None and quantized is not None else MISSING
    rows: list[tuple[str, float | None, str]] = [
        ("most common answer (blind)", accuracy.get("majority"), ""),
        ("best per question (blind)", accuracy.get("text_majority"), ""),
        ("wide", wide, _size(summary, "wide")),
        ("quantized", quantized, f"{change} points  {_size(summary, 'quantized')}".rstrip()),
    ]
    if served.get("asked"):
        latency = "" if served.get("p50_ms") is None else f", median {served['p50_ms']:.0f} ms"
        rows.append(
            ("served", served["right"] / served["asked"], f"{served['right']} of {served['asked']} over HTTP{latency}")
        )
    table = Table("model", "accuracy", "", "", title="Accuracy on the test questions", title_justify="left")
    table.columns[1].justify = "right"
    for label, share, note in rows:
        style = "dim" if "blind" in label else ""
        table.add_row(Text(label), Text(percent(share)), _bar(share), Text(note), style=style)
    return table


def _times(summary: Mapping[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    steps: Mapping[str, float] = summary.get("steps") or {}
    longest = max(steps.values(), default=0.0) or 1.0
    table = Table("step", "time", "", title="Time per step", title_justify="left")
    table.columns[1].justify = "right"
    for name, seconds in steps.items():
        table.add_row(Text(str(name)), Text(step_time(seconds)), _bar(seconds / longest))
    return table


def _bar(share: float | None) -> Any:
    from rich.bar import Bar

    return Bar(size=1.0, begin=0.0, end=min(max(share or 0.0, 0.0), 1.0), width=_BAR_WIDTH)


def _size(summary: Mapping[str, Any], model: str) -> str:
    parts = (summary.get("sizes") or {}).get(model) or {}
    return size(parts["total"]) if "total" in parts else ""
