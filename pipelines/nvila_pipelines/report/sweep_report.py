"""The page of a sweep: the recommended point, the Pareto front of every cost, all points, and what does not apply."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from nvila_pipelines.evaluation.sweep_request import COSTS, CostName, SweepRequest
from nvila_pipelines.report import plots
from nvila_pipelines.report.curation_panels import Panel
from nvila_pipelines.report.curation_report import environment

if TYPE_CHECKING:
    from nvila_pipelines.evaluation.sweep_result import SweepResult
    from nvila_platform.settings import Settings

_TEMPLATE = "sweep.html.j2"


@dataclass(frozen=True, slots=True, kw_only=True)
class PointRow:
    """A line of the table of points."""

    model: str
    name: str
    cells: tuple[str, ...]
    mark: str


def sweep_page(result: SweepResult, request: SweepRequest, settings: Settings) -> str:
    """Return the page.

    Args:
        result: The sweep.
        request: What was asked.
        settings: Where the list of fonts is kept.
    """
    from nvila_pipelines.evaluation.sweep_result import sentence

    with plots.cached_in(settings.workspace / "cache" / "matplotlib"):
        panels = [_panel(result, name) for name in COSTS]
    return str(
        environment()
        .get_template(_TEMPLATE)
        .render(
            names=[model.name for model in request.models],
            digests=[model.digest for model in request.models],
            data=request.data.rows.name,
            metric=result.metric,
            samples=max(point.samples for point in result.points),
            probes=request.probes,
            machine=f"{request.device}, {request.threads} threads, {request.dtype}",
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            sentence=sentence(result, request),
            panels=panels,
            rows=_rows(result, request),
            several=len(request.models) > 1,
            cost=COSTS[request.cost][1],
            failed=[(point.model, point.name, point.problem) for point in result.failed],
            left_out=result.left_out,
        )
    )


def _panel(result: SweepResult, cost: CostName) -> Panel:
    field, words = COSTS[cost]
    front = result.fronts[cost]
    points = [
        plots.FrontPoint(
            cost=point.cost[field],
            score=point.value or 0.0,
            low=point.low,
            high=point.high,
            on_front=number in front,
            chosen=number == result.recommendation.chosen,
        )
        for number, point in enumerate(result.points)
    ]
    cheapest, top = result.points[front[0]], result.points[front[-1]]
    text = (
        f"{len(front)} of {len(points)} points are on the front, from {cheapest.name} ({cheapest.value:.4f}) "
        f"to {top.name} ({top.value:.4f})."
    )
    alt = f"{result.metric} against {words}: {text}"
    svg = plots.front_scatter(points, axes=(words, result.metric), name=f"front-{cost}", alt=alt)
    return Panel(title=f"{result.metric} against {words}", svg=svg, text=text)


def _rows(result: SweepResult, request: SweepRequest) -> list[PointRow]:
    from nvila_pipelines.evaluation.sweep_result import cells

    field = COSTS[request.cost][0]
    order = sorted(range(len(result.points)), key=lambda n: (result.points[n].cost[field], n))
    marks = dict.fromkeys(result.fronts[request.cost], "front") | {result.recommendation.chosen: "recommended"}
    return [
        PointRow(
            model=result.points[n].model,
            name=result.points[n].name,
            cells=cells(result.points[n]),
            mark=marks.get(n, ""),
        )
        for n in order
    ]
