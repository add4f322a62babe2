"""A gate from policy file to verdict: evaluate, compare with the live model, time, weigh, judge, tell the registry."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.errors import ConfigError, DataError
from nvila_pipelines.evaluation.request import EvaluationRequest
from nvila_platform.artifacts import storage_errors, utc_now, write_atomically

if TYPE_CHECKING:
    from nvila.evaluation.gate import Verdict
    from nvila.evaluation.policy import Policy
    from nvila.evaluation.runner import Answerer
    from nvila.evaluation.sample_logs import Logged
    from nvila_platform.settings import Settings
    from nvila_platform.telemetry import ProgressView

VERDICT_FILE = "verdict.json"
STATE_TAG, REASON_TAG = "nvila.gate.state", "nvila.gate.reason"
# MLflow's own limit of a tag's value is 5,000.
_REASON_LETTERS = 1000

RequestOf = Callable[[str], EvaluationRequest]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateOutcome:
    """A verdict and where it stands.

    Args:
        verdict: What the gate says.
        file: The verdict's file.
        live: The live model that losses were measured against, if any.
    """

    verdict: Verdict
    file: Path
    live: str | None


def read_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        ConfigError: It cannot be read, or is no policy.
    """
    from nvila.evaluation.policy import parse_policy

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"the policy {path} cannot be read: {e}", "check the path") from e
    return parse_policy(text, str(path))


def run_gate(
    model: str, policy: Policy, request_of: RequestOf, settings: Settings, view: ProgressView, *, against: str | None
) -> GateOutcome:
    """Evaluate a model, apply the policy, write the verdict, and tag the registered version.

    Args:
        model: What `nvila evaluate` takes.
        policy: The policy.
        request_of: Makes the evaluation of a model, on the policy's tasks.
        settings: Where registry and store are.
        view: Draws progress.
        against: The live model instead of the policy's.

    Raises:
        ConfigError: The policy wants a live model and names none, or it is malformed.
        NvilaError: A model cannot be evaluated.
        InfrastructureError: The registry cannot be reached.
    """
    from nvila.evaluation.comparison import compare
    from nvila.evaluation.gate import Measured, judge
    from nvila.evaluation.sample_logs import read_logged
    from nvila_pipelines.evaluation.run import evaluate

    if not policy.tasks:
        raise ConfigError("the policy has no tasks, only limits of a rollout", "add tasks: {TASK: {min_score: 0.9}}")
    live = against or policy.against
    if policy.compares and live is None:
        raise ConfigError("the policy limits losses, but names no live model", "give against: models:/NAME@champion")
    live = live if policy.compares and live is not None and _exists(live, settings) else None
    request = request_of(model)
    evaluation = read_logged(evaluate(request, settings, view).whole().file)
    live_request = request_of(live) if live is not None else None
    comparisons = None
    if live_request is not None:
        comparisons = compare(
            read_logged(evaluate(live_request, settings, view).whole().file), evaluation, seed=request.seed
        )
    measured = Measured(
        evaluation=evaluation,
        against_live=comparisons,
        latency_ms=_latency(request, policy, settings, view) if policy.latency is not None else (),
        size_bytes=_size(request),
        live_size_bytes=None if live_request is None else _size(live_request),
    )
    verdict = judge(policy, measured)
    file = _write(request, evaluation, verdict, live)
    _tag(model, verdict, settings)
    return GateOutcome(verdict=verdict, file=file, live=live)


def gate_tags(verdict: dict[str, Any]) -> dict[str, str]:
    """Return the tags of MLflow that say what a gate said."""
    reason = str(verdict.get("reason") or "")
    shown = reason if len(reason) <= _REASON_LETTERS else reason[: _REASON_LETTERS - 3] + "..."
    return {STATE_TAG: "passed" if verdict.get("passed") else "refused", REASON_TAG: shown}


def verdict_lines(verdict: Verdict) -> list[str]:
    """Return a table of the checks."""
    from nvila_pipelines.evaluation.table import aligned

    rows = [("check", "", "value", "limit")]
    for check in verdict.checks:
        value = "-" if check.value is None else f"{check.value:.4f}"
        rows.append((check.name, "ok" if check.passed else "REFUSED", value, f"{check.limit:.4f}"))
    lines = aligned(rows)
    whys = ["", *(check.why for check in verdict.checks)]
    width = max(map(len, lines))
    return [f"{line:<{width}}  {why}".rstrip() for line, why in zip(lines, whys, strict=True)]


def _exists(live: str, settings: Settings) -> bool:
    from nvila_platform.registry import REGISTRY, resolve_if_any

    return not live.startswith(REGISTRY) or resolve_if_any(settings, live) is not None


def _latency(request: EvaluationRequest, policy: Policy, settings: Settings, view: ProgressView) -> list[float]:
    """Time answers of the first task one by one; the first one is not counted."""
    from nvila.evaluation.registry import find_task
    from nvila.evaluation.runner import read_samples
    from nvila_pipelines.evaluation.work import chosen_tasks, load_answerer, open_task
    from nvila_platform.s3_filesystem import data_filesystems

    assert policy.latency is not None
    task = find_task(next(iter(policy.tasks))) if not request.tasks else chosen_tasks(request)[0]
    rows = open_task(request, task, data_filesystems(settings))
    questions = [
        item
        for item in islice(read_samples(task, rows, request.limit), policy.latency.questions + 1)
        if hasattr(item, "pieces")
    ]
    if not questions:
        raise DataError(f"no sample of {task.name} can be asked, so no answer can be timed", "mend the data")
    answerer, reporter = load_answerer(request, settings), view.reporter("gate")
    return time_answers(
        answerer, questions, task.file.generation, lambda n: reporter.progress("time", n, len(questions))
    )


def time_answers(
    answerer: Answerer, questions: Sequence[Any], settings: Any, done: Callable[[int], None] = lambda n: None
) -> list[float]:
    """Return milliseconds of every answer but the first, which warms up; of one question, its second answer."""
    times = []
    for number, question in enumerate(questions if len(questions) > 1 else [*questions, *questions]):
        started = time.perf_counter()
        answerer.answer([question], settings)
        times.append(1000 * (time.perf_counter() - started))
        done(number + 1)
    return times[1:]


def _size(request: EvaluationRequest) -> int | None:
    if request.url:
        return None
    return sum(path.stat().st_size for path in Path(request.model).glob("*.safetensors"))


def _write(request: EvaluationRequest, evaluation: Logged, verdict: Verdict, live: str | None) -> Path:
    said = verdict.to_dict() | {
        "model": request.model_name,
        "model_digest": request.model_digest,
        "against": live,
        "results": str(evaluation.file),
        "time": utc_now(),
    }
    file = evaluation.file.with_name(evaluation.file.name.replace("_results.json", f"_{VERDICT_FILE}"))
    with storage_errors(file):
        write_atomically(file, json.dumps(said, indent=2) + "\n")
    return file


def _tag(model: str, verdict: Verdict, settings: Settings) -> None:
    from nvila_platform.registry import REGISTRY, tag_version

    if model.startswith(REGISTRY):
        tag_version(settings, model, gate_tags(verdict.to_dict()))


def policy_request(request: EvaluationRequest, policy: Policy, folder: Path) -> EvaluationRequest:
    """Return a request for the tasks of a policy; a task of one's own is found by `NAME.yaml` beside the policy."""
    own = [folder / f"{name}.yaml" for name in policy.tasks]
    tasks = tuple(str(path) if path.is_file() else name for path, name in zip(own, policy.tasks, strict=True))
    return replace(request, tasks=tasks)
