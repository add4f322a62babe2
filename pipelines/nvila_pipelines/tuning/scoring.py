"""How good a model is before and after: answers to held-out samples, and evaluation tasks."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nvila_platform.artifacts import write_atomically

if TYPE_CHECKING:
    from nvila_pipelines.tuning.preparing import Prepared
    from nvila_pipelines.tuning.request import TuneRequest
    from nvila_platform.settings import Settings
    from nvila_platform.telemetry import ProgressView

Which = Literal["base", "tuned"]
BASE: Which = "base"
TUNED: Which = "tuned"
HELD_OUT = "held_out"
_EXAMPLES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Scores of one model.

    Args:
        values: Main score of the held-out samples and of every task.
        examples: Some held-out samples with their answers.
    """

    values: dict[str, float] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)


def score_model(
    request: TuneRequest,
    prepared: Prepared,
    folder: Path,
    which: Which,
    out: Path,
    settings: Settings,
    view: ProgressView,
) -> Scores:
    """Score a model on the held-out samples, the tasks and the guard; a score that is there is taken.

    Raises:
        DataError: The data of a task cannot be read.
    """
    path = out / f"scores-{which}.json"
    if path.is_file():
        return Scores(**json.loads(path.read_text(encoding="utf-8")))
    scores = _held_out(request, prepared, folder, which, out, view)
    if request.tasks or request.guard:
        scores.values.update(_tasks(request, folder, which, settings, view))
    write_atomically(path, json.dumps(asdict(scores), indent=2) + "\n")
    return scores


def _held_out(
    request: TuneRequest, prepared: Prepared, folder: Path, which: Which, out: Path, view: ProgressView
) -> Scores:
    from nvila.assembly import load_model
    from nvila.evaluation.scorers.table import find_scorer
    from nvila.tuning.answering import answer_stream

    if prepared.data.held_out is None:
        return Scores()
    scorer = find_scorer(request.scorer, "--scorer")
    model, processor = load_model(folder)
    answered = answer_stream(
        model.to(request.device),  # type: ignore[arg-type]  # transformers types `to` as a function
        processor,
        prepared.data.held_out,
        reporter=view.reporter("evaluate"),
        phase=f"held-out, {which}",
    )
    marks = [scorer.score(one.said, {"answer": one.wanted, "id": one.id}) for one in answered]
    lines = [
        json.dumps({**asdict(one), **{name: value for name, value in mark.items() if name in scorer.metrics}})
        for one, mark in zip(answered, marks, strict=True)
    ]
    write_atomically(out / f"held-out-{which}.jsonl", "".join(f"{line}\n" for line in lines))
    value = scorer.metrics[scorer.main].aggregate(marks)
    return Scores(values={HELD_OUT: value} if marks else {}, examples=[asdict(one) for one in answered[:_EXAMPLES]])


def _tasks(
    request: TuneRequest, folder: Path, which: Which, settings: Settings, view: ProgressView
) -> dict[str, float]:
    from nvila_pipelines.evaluation.request import EvaluationRequest
    from nvila_pipelines.evaluation.run import evaluate, model_digest

    found: dict[str, float] = {}
    for names, limit in ((request.tasks, None), (request.guard, request.guard_limit)):
        if not names:
            continue
        done = evaluate(
            EvaluationRequest(
                model=str(folder.absolute()),
                model_name=which,
                model_digest=model_digest(folder),
                tasks=names,
                out=str(settings.workspace / "evaluations"),
                data={name: place for name, place in request.task_data.items() if name in names},
                limit=limit,
                threads=int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count() or 1,
                device=request.device,
            ),
            settings,
            view,
        ).whole()
        for result in done.results:
            found[result.task.name] = result.estimates[result.task.scorer.main].value
    return found
