"""A sweep from request to measured points: every finished point is a file, and is not measured again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila_pipelines.evaluation.request import ANSWERS
from nvila_pipelines.evaluation.sweep_request import SweepRequest, SweptModel
from nvila_platform.artifacts import storage_errors, write_atomically

if TYPE_CHECKING:
    from nvila.evaluation.asking import Question
    from nvila.evaluation.model_answerer import ModelAnswerer
    from nvila.evaluation.sweep.points import LeftOut, Point
    from nvila.modeling import NVILAForConditionalGeneration
    from nvila.processing import NVILAProcessor
    from nvila.progress import Reporter

POINTS = "points"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPoint:
    """A point with what it reached.

    Args:
        model: Name of the model.
        name: Of the point.
        point: Its settings.
        value: The task's main metric; None where the point cannot be measured.
        low: Lower end of its interval; None where there is none.
        high: Upper end.
        samples: Samples with a score.
        failed: Samples without.
        marks: Main mark of every sample, by its digest.
        cost: Costs of a question, as `nvila.evaluation.sweep.costs.Cost` has them.
        problem: Why the point cannot be measured.
    """

    model: str
    name: str
    point: dict[str, Any]
    value: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int = 0
    failed: int = 0
    marks: dict[str, float] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """All points of a sweep, and what was left out of each model's."""

    points: tuple[MeasuredPoint, ...]
    left_out: tuple[tuple[str, LeftOut], ...]


def sweep_points(request: SweepRequest, reporter: Reporter) -> Swept:
    """Measure every point that is not measured yet.

    Raises:
        ConfigError: Nothing applies, or a choice is malformed.
        DataError: The data cannot be asked.
        ResourceError: The disk is full.
    """
    from nvila.evaluation.sweep.points import plan_points

    probes = _probes(request)
    kinds = {piece.kind for question in probes for piece in question.pieces}
    work: list[tuple[SweptModel, list[Point]]] = []
    left_out: list[tuple[str, LeftOut]] = []
    for model in request.models:
        config, quantized = _config(model.folder)
        points, left = plan_points(
            config, request.choices, images="image" in kinds, videos="video" in kinds, quantized=quantized
        )
        work.append((model, points))
        left_out += [(model.name, one) for one in left]
    with storage_errors(request.out):
        (request.out / POINTS).mkdir(parents=True, exist_ok=True)
    total = sum(len(points) for _, points in work)
    measured: list[MeasuredPoint] = []
    for model, points in work:
        loaded = _Loaded(request, model)
        for point in points:
            reporter.progress("points", len(measured), total)
            measured.append(_measured(request, model, point, loaded, probes, reporter))
    reporter.progress("points", total, total)
    return Swept(points=tuple(measured), left_out=tuple(left_out))


class _Loaded:
    """The model in one form at a time: the next form is loaded when a point asks for it."""

    def __init__(self, request: SweepRequest, model: SweptModel) -> None:
        self._request, self._model = request, model
        self._form: str | None = None
        self._pair: tuple[NVILAForConditionalGeneration, NVILAProcessor] | None = None

    def at(self, point: Point) -> ModelAnswerer:
        """Return the model set to a point.

        Raises:
            ConfigError: The weights cannot have this form.
        """
        from nvila.evaluation.model_answerer import ModelAnswerer
        from nvila.evaluation.sweep.points import applied

        if self._pair is None or self._form != point.form:
            self._pair = None  # before the next one is loaded
            self._pair, self._form = self._load(point.form), point.form
        model, processor = self._pair
        return ModelAnswerer(model, applied(point, model.config, processor))  # type: ignore[arg-type]

    def _load(self, form: str) -> tuple[NVILAForConditionalGeneration, NVILAProcessor]:
        import torch

        from nvila.evaluation.sweep.points import FORMS
        from nvila.quantization.config import QuantizationConfig
        from nvila.quantization.quantize import quantize_model
        from nvila_pipelines.evaluation.work import load_quietly
        from nvila_pipelines.quantization.request import fitting_group

        torch.set_num_threads(self._request.threads)
        model, processor = load_quietly(self._model.folder, self._request.dtype)
        if form in FORMS:
            vision, language = FORMS[form]
            group = fitting_group(self._model.folder, vision, language)
            quantize_model(model, QuantizationConfig(vision=vision, language=language, group_size=group))  # type: ignore[arg-type]
        return model.to(self._request.device), processor  # type: ignore[arg-type]


@dataclass(kw_only=True)
class _Work:
    """The measurement of one point."""

    request: SweepRequest
    model: SweptModel
    point: Point
    loaded: _Loaded
    probes: list[Question]
    reporter: Reporter

    @cached_property
    def answerer(self) -> ModelAnswerer:
        return self.loaded.at(self.point)

    def measure(self) -> MeasuredPoint:
        """Ask, score, and measure costs."""
        from nvila.evaluation.answer_log import AnswerLog
        from nvila.evaluation.results import summarize
        from nvila.evaluation.runner import TaskRun, check_failures, score_all
        from nvila.evaluation.sweep.costs import measure_costs

        request, data = self.request, self.request.data
        settings = {"dtype": request.dtype, "point": self.point.to_dict()}
        log = AnswerLog.open(request.out / ANSWERS, data.task, self.model.digest, settings)
        # Costs first: a prompt that does not fit shows before all the others are asked.
        cost = measure_costs(self.answerer, self.probes, data.task.file.generation)
        samples = TaskRun(
            task=data.task,
            rows=data.rows,
            log=log,
            load=lambda: self.answerer,
            batch_size=request.batch_size,
            limit=request.limit,
            reporter=self.reporter,
        ).run()
        outcome = score_all(data.task, data.rows, log, samples=samples)
        check_failures(data.task, outcome, request.max_failed)
        main = data.task.scorer.main
        estimate = summarize(data.task, data.rows.name, outcome, seed=request.seed).estimates[main]
        marks = {one.question.digest: one.marks[main] for one in outcome.scored if main in one.marks}
        return MeasuredPoint(
            model=self.model.name,
            name=self.point.name,
            point=self.point.to_dict(),
            value=estimate.value,
            low=_number(estimate.low),
            high=_number(estimate.high),
            samples=len(outcome.scored),
            failed=len(outcome.failures),
            marks={digest: float(mark) for digest, mark in marks.items() if mark is not None},
            cost=cost.to_dict(),
        )


def _measured(
    request: SweepRequest,
    model: SweptModel,
    point: Point,
    loaded: _Loaded,
    probes: list[Question],
    reporter: Reporter,
) -> MeasuredPoint:
    """Return a point from its file, or measure it and write the file."""
    from dataclasses import asdict

    from nvila.errors import ConfigError
    from nvila.evaluation.runner import PromptTooLongError
    from nvila_platform.artifacts import content_key

    key = content_key("sweep", request.depends(model, point.to_dict()), {}, "")
    file = request.out / POINTS / f"{key}.json"
    kept = _read(file)
    if kept is not None:
        return kept
    work = _Work(request=request, model=model, point=point, loaded=loaded, probes=probes, reporter=reporter)
    try:
        found = work.measure()
    except (ConfigError, PromptTooLongError) as e:
        # This point cannot be run; the others can.
        reporter.notice(f"{model.name}, {point.name}: {e.message}")
        found = MeasuredPoint(model=model.name, name=point.name, point=point.to_dict(), problem=e.message)
    with storage_errors(file):
        write_atomically(file, json.dumps(asdict(found), ensure_ascii=False) + "\n")
    return found


def _read(file: Path) -> MeasuredPoint | None:
    try:
        return MeasuredPoint(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _probes(request: SweepRequest) -> list[Question]:
    """Return questions spread evenly over the data, for costs.

    Raises:
        DataError: Nothing can be asked.
    """
    from nvila.errors import DataError
    from nvila.evaluation.runner import Failure

    count = request.data.rows.count()
    count = count if request.limit is None else min(count, request.limit)
    wanted = {count * n // request.probes for n in range(request.probes)}
    asked = list(islice(_asked(request, wanted), request.probes))
    found = [item for item in asked if not isinstance(item, Failure)]
    if not found:
        why = f": {asked[0].problem}" if asked and isinstance(asked[0], Failure) else ""
        raise DataError(f"no sample of {request.data.rows.name} can be asked{why}", "check the data")
    return found


def _asked(request: SweepRequest, wanted: set[int]) -> Iterator[Any]:
    from nvila.evaluation.runner import read_samples

    return read_samples(request.data.task, request.data.rows, request.limit, wanted=wanted.__contains__)


def _config(folder: Path) -> tuple[Any, bool]:
    """Return a model's configuration without its weights, and whether these are quantized.

    Raises:
        CheckpointError: The folder is no model of ours.
    """
    from nvila.configuration import NVILAConfig
    from nvila.errors import CheckpointError
    from nvila.quantization.saved import is_quantized
    from nvila.tuning.adapters import is_adapter

    if is_adapter(folder):
        raise CheckpointError(f"{folder} is an adapter", "merge it into its base: nvila adapters merge ADAPTER DIR")
    try:
        return NVILAConfig.from_pretrained(folder), is_quantized(folder)
    except (OSError, ValueError) as e:
        raise CheckpointError(f"cannot read the configuration of {folder}: {e}", "name the folder of a model") from e


def _number(value: float) -> float | None:
    return None if value != value else value
