"""What each section of the report shows, computed from the outputs of the steps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvila.errors import ArtifactError
from nvila_pipelines.report import plots
from nvila_pipelines.report.curation_panels import Panel, Selection, selection_of
from nvila_pipelines.report.formats import MISSING, number, percent, points, size, step_time
from nvila_pipelines.report.gallery import Group, answered, curated, samples_by_id, thumbnails
from nvila_pipelines.report.outputs import Outputs, predictions
from nvila_pipelines.report.score_summary import summarise

PARTS = ("vision", "projector", "language", "total")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One row of a table with a bar: a label, cells of text, and the bar's length as a share of the longest."""

    label: str
    cells: tuple[str, ...]
    share: float
    kind: str = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One condition of the gate."""

    name: str
    value: str
    limit: str
    passed: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate section shows."""

    checks: tuple[Check, ...]
    paired: str


def headline(outputs: Outputs, summary: Mapping[str, Any]) -> tuple[Bar, ...]:
    """Return accuracy of the blind baselines, the wide, the quantized and the served model."""
    accuracy = summary.get("accuracy") or {}
    asked = _asked(outputs)
    rows = [
        ("Most common answer to everything", accuracy.get("majority"), "blind: reads not even the question", "blind"),
        ("Best answer to each question text", accuracy.get("text_majority"), "blind: does not see the image", "blind"),
        ("Wide model", accuracy.get("wide"), asked, "wide"),
        ("Quantized model", accuracy.get("quantized"), asked, "quantized"),
    ]
    served = summary.get("served") or {}
    if served.get("asked"):
        note = f"{served['right']} of {served['asked']} questions over HTTP, median {_milliseconds(served)}"
        rows.append(("Served model", served["right"] / served["asked"], note, "quantized"))
    return tuple(
        Bar(label=label, cells=(percent(share), note), share=_unit(share), kind=kind)
        for label, share, note, kind in rows
        if share is not None
    )


def by_kind(outputs: Outputs) -> tuple[tuple[str, ...], ...]:
    """Return rows (kind, questions, blind, wide, quantized, difference in points)."""
    wide, _ = outputs.evaluation("wide")
    quantized, _ = outputs.evaluation("quantized")
    blind = wide.get("baselines", {}).get("by_source", {})
    rows = [
        (kind, cell["total"], blind.get(kind), cell["accuracy"], quantized["by_source"].get(kind, {}).get("accuracy"))
        for kind, cell in sorted(wide["by_source"].items())
    ]
    overall = (wide["accuracy"], quantized["accuracy"])
    rows.append(("all", wide["num_samples"], wide.get("baselines", {}).get("text_majority"), *overall))
    return tuple(_kind_row(*row) for row in rows)


def sizes(outputs: Outputs) -> tuple[Bar, ...]:
    """Return bytes by part of the wide and the quantized model; the bar is the share that is left."""
    table = outputs.json("quantize", "sizes.json")
    wide, quantized = table["wide"], table["quantized"]
    return tuple(
        Bar(
            label=part,
            cells=(size(wide[part]), size(quantized[part]), percent(quantized[part] / wide[part])),
            share=_unit(quantized[part] / wide[part]),
            kind="quantized",
        )
        for part in PARTS
        if wide.get(part) and part in quantized
    )


def quantization(outputs: Outputs) -> tuple[tuple[str, ...], ...]:
    """Return a head and one row a part: what was asked for, what it cost, what it changed."""
    # Here, because the table takes the report's ways of writing numbers.
    from nvila_pipelines.quantization.table import HEAD, report_rows

    report = outputs.json("quantize", "quantization.json")
    speeds = outputs.metrics().get("quantize", {})
    now = _speed(speeds, "wide")
    for part in report["parts"]:
        part["speed_before"], part["speed_after"] = now, _speed(speeds, part["part"])
        now = part["speed_after"] if part["kept"] else now
    report["speed_before"], report["speed_after"] = _speed(speeds, "wide"), _speed(speeds, "quantized")
    return (HEAD, *report_rows(report))


def times(summary: Mapping[str, Any]) -> tuple[Bar, ...]:
    """Return the time of every step in the order in which they ran."""
    steps = {str(name): float(seconds) for name, seconds in (summary.get("steps") or {}).items()}
    longest = max(steps.values(), default=0.0) or 1.0
    total = sum(steps.values()) or 1.0
    return tuple(
        Bar(label=name, cells=(step_time(seconds), percent(seconds / total)), share=seconds / longest)
        for name, seconds in steps.items()
    )


def losses(outputs: Outputs) -> tuple[Panel, ...]:
    """Return one loss curve a training stage, on a common scale."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in outputs.rows("train", "metrics.jsonl"):
        curves[str(row["stage"])].append((int(row["step"]), float(row["loss"])))
    limits = plots.loss_limits(curves)
    return tuple(_loss_panel(index, stage, curve, limits) for index, (stage, curve) in enumerate(curves.items()))


def selection(outputs: Outputs) -> Selection:
    """Return histograms by source, the scatter of both losses and the gallery of curated samples."""
    scores, kept = (outputs.file("curate", name) for name in ("scores.parquet", "selection.parquet"))
    try:
        summary = summarise(scores, kept)
    except ArtifactError as e:
        raise ArtifactError(f"The output of the step curate cannot be read: {e.message}", e.hint) from e
    samples = samples_by_id(outputs.file("data", "train.jsonl"))
    return selection_of(summary, curated(summary.ends, samples, thumbnails(outputs)))


def examples(outputs: Outputs) -> tuple[Group, ...]:
    """Return answered questions of the quantized model, wrong ones first."""
    _, directory = outputs.evaluation("quantized")
    return answered(predictions(directory), thumbnails(outputs))


def gate(outputs: Outputs) -> Verdict:
    """Return the gate's checks and the paired comparison of both models."""
    verdict = outputs.json("gate", "verdict.json")
    checks = tuple(
        Check(
            name=str(check["name"]).replace("_", " "),
            value=number(check["value"]),
            limit=number(check["limit"]),
            passed=bool(check["passed"]),
            why=str(check.get("why") or ""),
        )
        for check in verdict["checks"]
    )
    paired = verdict.get("paired")
    return Verdict(checks=checks, paired=_paired(paired) if paired else "")


def environment(summary: Mapping[str, Any]) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Return titled tables of versions and hardware."""
    titled = (("Versions", summary.get("versions")), ("Hardware", summary.get("hardware")))
    return tuple(
        (title, tuple((str(name), number(value)) for name, value in values.items()))
        for title, values in titled
        if values
    )


def _speed(metrics: Mapping[str, float], form: str) -> dict[str, float] | None:
    """Return what a step's metrics say about the speed of one form of the model."""
    names = {"ttft_ms": f"ttft_ms_{form}", "decode_tokens_per_s": f"decode_tokens_per_second_{form}"}
    return {key: metrics[name] for key, name in names.items()} if set(names.values()) <= metrics.keys() else None


def _kind_row(kind: str, total: int, blind: float | None, wide: float, quantized: float | None) -> tuple[str, ...]:
    change = None if quantized is None else quantized - wide
    shares = (percent(share).removesuffix(" %") for share in (blind, wide, quantized))
    return kind, f"{total:,}", *shares, points(change)


def _asked(outputs: Outputs) -> str:
    try:
        results, _ = outputs.evaluation("wide")
    except ArtifactError:
        return "test questions"
    return f"{int(results['num_samples']):,} test questions"


def _paired(paired: Mapping[str, Any]) -> str:
    drop, low, high = (float(paired[name]) * 100 for name in ("drop", "low", "high"))
    return (
        f"Both models answered the same questions. Quantization loses {drop:.2f} points, with a 95 % interval from "
        f"{low:.2f} to {high:.2f}: {paired['worse']} answers became wrong and {paired['better']} became right."
    )


def _loss_panel(index: int, stage: str, curve: Sequence[tuple[int, float]], limits: tuple[float, float]) -> Panel:
    first, last = curve[0][1], curve[-1][1]
    text = f"to step {curve[-1][0]:,}; from {first:.3g} to {last:.3g}"
    svg = plots.loss_curve(curve, limits, name=f"loss{index}", alt=f"Loss of stage {stage}: {text}")
    return Panel(title=stage, svg=svg, text=text)


def _milliseconds(served: Mapping[str, Any]) -> str:
    value = served.get("p50_ms")
    return MISSING if value is None else f"{value:.0f} ms"


def _unit(share: float | None) -> float:
    return min(max(share, 0.0), 1.0) if share is not None and math.isfinite(share) else 0.0
