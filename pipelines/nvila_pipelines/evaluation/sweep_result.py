"""What a sweep found: fronts, the recommended point, a table, and the files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila_pipelines.evaluation.sweep import MeasuredPoint, Swept
from nvila_pipelines.evaluation.sweep_request import COSTS, CostName, SweepRequest
from nvila_platform.artifacts import storage_errors, utc_now, write_atomically

if TYPE_CHECKING:
    from nvila.evaluation.sweep.front import Weighed
    from nvila_platform.settings import Settings

FILE, PAGE = "sweep.json", "sweep.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The cheapest point that loses little.

    Args:
        chosen: Number of the point among the measured ones.
        best: Number of the point with the highest score.
        low: Lower end of the 95% interval of the score of the chosen point minus the best; None where there is none.
        high: Upper end.
    """

    chosen: int
    best: int
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """Measured points with what follows from them.

    Args:
        points: Points with a score.
        failed: Points that cannot be run.
        left_out: Model, setting and reason of what does not apply.
        fronts: By cost, the numbers of the points that no other one beats, cheapest first.
        recommendation: What to take.
        metric: The main metric.
    """

    points: tuple[MeasuredPoint, ...]
    failed: tuple[MeasuredPoint, ...]
    left_out: tuple[tuple[str, str, str], ...]
    fronts: dict[CostName, list[int]]
    recommendation: Recommendation
    metric: str


def judge_sweep(swept: Swept, request: SweepRequest) -> SweepResult:
    """Find fronts and the recommendation.

    Raises:
        DataError: No point could be measured.
    """
    from nvila.errors import DataError
    from nvila.evaluation.statistics import compare_paired
    from nvila.evaluation.sweep.front import best, pareto_front, recommended

    points = tuple(point for point in swept.points if point.value is not None)
    failed = tuple(point for point in swept.points if point.value is None)
    if not points:
        raise DataError(f"no point can be run; the first: {failed[0].problem}", "name other values")
    scorer = request.data.task.scorer
    sign = 1.0 if scorer.metrics[scorer.main].higher_is_better else -1.0
    by_cost = {name: _weighed(points, name, sign) for name in COSTS}
    weighed = by_cost[request.cost]
    chosen, top = recommended(weighed, request.loss), best(weighed)
    low = high = None
    shared = [digest for digest in points[top].marks if digest in points[chosen].marks]
    if chosen != top and shared and scorer.metrics[scorer.main].is_mean:
        paired = compare_paired(
            [points[top].marks[digest] for digest in shared],
            [points[chosen].marks[digest] for digest in shared],
            seed=request.seed,
        )
        low, high = paired.low, paired.high
    return SweepResult(
        points=points,
        failed=failed,
        left_out=tuple((model, one.setting, one.why) for model, one in swept.left_out),
        fronts={name: pareto_front(found) for name, found in by_cost.items()},
        recommendation=Recommendation(chosen=chosen, best=top, low=low, high=high),
        metric=scorer.main,
    )


def write_sweep(result: SweepResult, request: SweepRequest, settings: Settings) -> Path:
    """Write `sweep.json` and the page, and return the page.

    Raises:
        ResourceError: The disk is full.
    """
    from nvila_pipelines.report.sweep_report import sweep_page

    with storage_errors(request.out):
        write_atomically(request.out / FILE, json.dumps(to_dict(result, request), indent=2, ensure_ascii=False) + "\n")
        write_atomically(request.out / PAGE, sweep_page(result, request, settings))
    return request.out / PAGE


def to_dict(result: SweepResult, request: SweepRequest) -> dict[str, Any]:
    """Return the JSON form."""
    said = result.recommendation
    return {
        "models": [{"name": one.name, "folder": str(one.folder), "digest": one.digest} for one in request.models],
        "data": request.data.rows.name,
        "task": request.data.task.name,
        "metric": result.metric,
        "written": utc_now(),
        "measured_on": {
            name: getattr(request, name) for name in ("device", "threads", "dtype", "limit", "probes", "seed")
        },
        "points": [_without_marks(point) for point in result.points],
        "cannot_run": [{"model": point.model, "point": point.point, "why": point.problem} for point in result.failed],
        "left_out": [{"model": model, "setting": setting, "why": why} for model, setting, why in result.left_out],
        "fronts": result.fronts,
        "recommended": {
            "point": said.chosen,
            "best": said.best,
            "cost": request.cost,
            "loss": request.loss,
            "difference": _value(result, said.chosen) - _value(result, said.best),
            "low": said.low,
            "high": said.high,
            "sentence": sentence(result, request),
        },
    }


def table_lines(result: SweepResult, request: SweepRequest) -> list[str]:
    """Return the points as a table, the cheapest first, with marks for the front and the recommendation."""
    from nvila_pipelines.evaluation.table import aligned

    several = len(request.models) > 1
    head = ("model" if several else "", "point", result.metric, "95% interval", "tokens", "first token", "memory", "")
    field = COSTS[request.cost][0]
    order = sorted(range(len(result.points)), key=lambda n: (result.points[n].cost[field], n))
    front = result.fronts[request.cost]
    rows = [head]
    for n in order:
        point = result.points[n]
        mark = "<- recommended" if n == result.recommendation.chosen else "front" if n in front else ""
        rows.append((point.model if several else "", point.name, *cells(point), mark))
    lines = aligned(rows)
    return [line.strip() if not several else line for line in lines]


def other_lines(result: SweepResult) -> list[str]:
    """Return what cannot be run and what does not apply, a line each with the reason."""
    lines = [f"cannot be run: {point.model}, {point.name}: {point.problem}" for point in result.failed]
    return lines + [f"not applicable: {model}, {setting}: {why}" for model, setting, why in result.left_out]


def cells(point: MeasuredPoint) -> tuple[str, str, str, str, str]:
    """Return score, interval, tokens, time and memory as people read them."""
    interval = "-" if point.low is None or point.high is None else f"{point.low:.4f} - {point.high:.4f}"
    cost = point.cost
    return (
        f"{point.value:.4f}",
        interval,
        f"{cost['tokens']:,.0f}",
        f"{cost['ttft_ms']:.1f} ms",
        f"{cost['memory_mib']:,.1f} MiB",
    )


def sentence(result: SweepResult, request: SweepRequest) -> str:
    """Return the recommendation in words."""
    said = result.recommendation
    chosen, top = result.points[said.chosen], result.points[said.best]
    field = COSTS[request.cost][0]
    words = COSTS[request.cost][1].partition(",")[0]
    what = f"{chosen.name}" if len(request.models) == 1 else f"{chosen.model}, {chosen.name}"
    if said.chosen == said.best:
        return f"Take {what}: no point that is cheaper in {words} is within {100 * request.loss:g} points of the best."
    times = top.cost[field] / chosen.cost[field] if chosen.cost[field] else float("inf")
    difference = 100 * (_value(result, said.chosen) - _value(result, said.best))
    interval = (
        "" if said.low is None or said.high is None else f" (95%: {100 * said.low:+.1f} to {100 * said.high:+.1f})"
    )
    return (
        f"Take {what}: {difference:+.1f} points of {result.metric}{interval} against the best, {top.name}"
        f"{f' of {top.model}' if len(request.models) > 1 else ''}, and {times:.1f} times cheaper in {words}."
    )


def _weighed(points: tuple[MeasuredPoint, ...], cost: CostName, sign: float) -> list[Weighed]:
    from nvila.evaluation.sweep.front import Weighed

    field = COSTS[cost][0]
    return [Weighed(cost=point.cost[field], score=sign * (point.value or 0.0)) for point in points]


def _value(result: SweepResult, number: int) -> float:
    return result.points[number].value or 0.0


def _without_marks(point: MeasuredPoint) -> dict[str, Any]:
    return {name: value for name, value in asdict(point).items() if name not in ("marks", "problem")}
