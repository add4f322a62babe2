"""What the body of every Kubeflow component calls.

The artifacts that Kubeflow passes between tasks are small files with a reference into the artifact store, so results
of any size are neither copied nor packed on their way. Beside them a task writes what the Kubeflow UI shows.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nvila.errors import InfrastructureError, NvilaError
from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.pod_tracking import PodTracking
from nvila_pipelines.steps.runner import RunContext, run_step
from nvila_pipelines.training.nodes import sized
from nvila_platform.artifacts import read_manifest
from nvila_platform.launch.child import collect_rarely, die_with, die_with_parent
from nvila_platform.launch.outcome import leave_error
from nvila_platform.launch.stopping import GO_ON, Terminated, stoppable_task
from nvila_platform.settings import Settings, runner_pid, task_retries, tasks_folder
from nvila_platform.store import ArtifactRef, open_store
from nvila_platform.telemetry import configure_logging

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_WAIT_S = 10.0
_LONGEST_WAIT_S = 300.0


class OutputArtifact(Protocol):
    """The part of a Kubeflow output artifact that is written here."""

    path: str
    metadata: dict[str, Any]


class ConfusionArtifact(OutputArtifact, Protocol):
    """The part of a Kubeflow artifact of classification metrics that is written here."""

    def log_confusion_matrix(self, categories: list[str], matrix: list[list[int]]) -> None:
        """Take a matrix with a row for each right answer."""


def run_component(
    step: str,
    recipe: str,
    run_id: str,
    inputs: Mapping[str, str],
    result: OutputArtifact,
    metrics: OutputArtifact,
    report: OutputArtifact,
    *,
    size: str = "0x0",
) -> Path:
    """Run a step inside a Kubeflow task and write the reference to its result.

    Args:
        step: Step in the table.
        recipe: Resolved recipe as JSON.
        run_id: Run that the task belongs to.
        inputs: Files with references, by input name.
        result: Output artifact that gets the reference.
        metrics: Output artifact that gets the step's numbers.
        report: Output artifact that gets what the UI shows of the step.
        size: NODESxGPUS of the training job; 0 leaves what the task's settings say.

    Returns:
        The local directory of the result.

    Raises:
        SystemExit: The step failed with a typed error, which was left for the parent process; or it was stopped.
    """

    def work(settings: Settings) -> tuple[ArtifactRef, Path, str]:
        refs = {name: ArtifactRef.from_json(Path(path).read_text(encoding="utf-8")) for name, path in inputs.items()}
        run = RunContext(run_id=run_id, settings=sized(settings, size))
        found = Recipe.from_json(recipe)
        with PodTracking(step, found, refs, run) as tracking:
            ref = run_step(step, found, refs, run)
            directory = open_store(settings).fetch(ref)
            shown = _report_of(step, directory, settings)
            tracking.show(directory, shown)
        return ref, directory, shown

    ref, directory, shown = run_task(step, run_id, work)
    write_text(result, ref.to_json())
    result.metadata.update(json.loads(ref.to_json()))
    manifest = read_manifest(directory)
    write_metrics(metrics, {} if manifest is None else manifest.metrics)
    write_text(report, shown)
    return directory


def run_evaluation(
    recipe: str,
    run_id: str,
    inputs: Mapping[str, str],
    result: OutputArtifact,
    metrics: OutputArtifact,
    report: OutputArtifact,
    confusion: ConfusionArtifact,
) -> None:
    """Run the evaluation of a model, whose form follows from the step that made it.

    Args:
        recipe: Resolved recipe as JSON.
        run_id: Run that the task belongs to.
        inputs: Files with references to `data` and `model`.
        result: Output artifact that gets the reference.
        metrics: Output artifact that gets the step's numbers.
        report: Output artifact that gets what the UI shows of the step.
        confusion: Output artifact that gets which answers were taken for which.

    Raises:
        SystemExit: As in `run_component`.
    """
    from nvila_pipelines.report.confusion import confusion_matrix
    from nvila_pipelines.report.outputs import predictions

    made_by = ArtifactRef.from_json(Path(inputs["model"]).read_text(encoding="utf-8")).step
    step = "evaluate-quantized" if made_by == "quantize" else "evaluate-wide"
    directory = run_component(step, recipe, run_id, inputs, result, metrics, report)
    categories, matrix = confusion_matrix(predictions(directory))
    confusion.log_confusion_matrix(categories, matrix)
    # Without a file kfp would take the artifact for missing.
    write_text(confusion, json.dumps({"categories": categories, "matrix": matrix}))


def run_task(name: str, run_id: str, work: Callable[[Settings], T]) -> T:
    """Do the work of a task; what only an outage stopped is tried again as often as the profile says.

    Args:
        name: Of the task, for logs.
        run_id: Run that it belongs to, for logs; empty where Kubeflow's name is all there is.
        work: What it does.

    Raises:
        SystemExit: It failed with a typed error, which was left for the parent process; or it was stopped.
    """
    # When the run is killed its tasks must not go on alone. The parent is a shell that would outlive the run.
    die_with_parent(signal.SIGKILL, os.getppid())
    if (runner := runner_pid()) is not None:
        die_with(runner)
    collect_rarely()
    try:
        settings = Settings.load()
        configure_logging(settings.log_format, context={"run_id": run_id, "step": name} if run_id else {"step": name})
        with stoppable_task(tasks_folder()):
            return _patiently(name, lambda: work(settings))
    except Terminated as e:
        stopped = InfrastructureError(f"step {name} was stopped by SIGTERM", GO_ON)
        leave_error(stopped)
        raise SystemExit(stopped.exit_code) from e
    except NvilaError as e:
        leave_error(e)
        raise SystemExit(e.exit_code) from e


def write_metrics(metrics: OutputArtifact, values: Mapping[str, float]) -> None:
    """Write numbers; without a file kfp would take the artifact for missing."""
    metrics.metadata.update(values)
    write_text(metrics, json.dumps(dict(values)))


def write_text(artifact: OutputArtifact, text: str) -> None:
    """Write the file of an artifact."""
    target = Path(artifact.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


def _report_of(step: str, directory: Path, settings: Settings) -> str:
    """Return what the Kubeflow UI shows of a step."""
    from nvila_pipelines.report.kubeflow import step_report
    from nvila_pipelines.report.plots import cached_in

    # The report of the run shows the same figures, and so does every run that finds the step done.
    with cached_in(settings.workspace / "cache" / "matplotlib"):
        return step_report(step, directory)


def _patiently(name: str, work: Callable[[], T]) -> T:
    wait_s = _FIRST_WAIT_S
    for left in range(task_retries(), 0, -1):
        try:
            return work()
        except NvilaError as e:
            if not e.retryable:
                raise
            logger.warning("%s: %s; trying again in %.0f s, %d more times", name, e.message, wait_s, left)
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
    return work()
