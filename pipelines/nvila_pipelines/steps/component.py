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
from nvila_pipelines.steps.runner import TRACKING_RUN_FILE, RunContext, run_step, step_config
from nvila_pipelines.steps.table import step_spec
from nvila_pipelines.tracked_data import datasets_of
from nvila_pipelines.training.nodes import sized
from nvila_platform.artifacts import read_manifest, utc_now, write_atomically
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

    def work(settings: Settings) -> tuple[ArtifactRef, Path]:
        refs = {name: ArtifactRef.from_json(Path(path).read_text(encoding="utf-8")) for name, path in inputs.items()}
        run = RunContext(run_id=run_id, settings=sized(settings, size))
        found = Recipe.from_json(recipe)
        with _Tracked(step, found, refs, run):
            ref = run_step(step, found, refs, run)
        return ref, open_store(settings).fetch(ref)

    ref, directory = run_task(step, run_id, work)
    write_text(result, ref.to_json())
    result.metadata.update(json.loads(ref.to_json()))
    show_step(step, directory, metrics, report)
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


def show_step(step: str, directory: Path, metrics: OutputArtifact, report: OutputArtifact) -> None:
    """Write what the Kubeflow UI shows of a step."""
    from nvila_pipelines.report.kubeflow import step_report
    from nvila_pipelines.report.plots import cached_in

    manifest = read_manifest(directory)
    write_metrics(metrics, {} if manifest is None else manifest.metrics)
    # The report of the run shows the same figures, and so does every run that finds the step done.
    with cached_in(Settings.load().workspace / "cache" / "matplotlib"):
        write_text(report, step_report(step, directory))


def write_metrics(metrics: OutputArtifact, values: Mapping[str, float]) -> None:
    """Write numbers; without a file kfp would take the artifact for missing."""
    metrics.metadata.update(values)
    write_text(metrics, json.dumps(dict(values)))


def write_text(artifact: OutputArtifact, text: str) -> None:
    """Write the file of an artifact."""
    target = Path(artifact.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


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


class _Tracked:
    """Tells MLflow about a step that runs where nobody follows the run's events: in a pod of its own."""

    def __init__(self, step: str, recipe: Recipe, inputs: Mapping[str, ArtifactRef], run: RunContext) -> None:
        self._step, self._recipe, self._inputs, self._run = step, recipe, inputs, run
        self._tracker: Any = None
        self._load: Any = None
        self._began = utc_now()

    def __enter__(self) -> None:
        if runner_pid() is not None:
            return
        from nvila_platform.pipeline_runs import RUN_TAG, parent_run
        from nvila_platform.system_metrics import SystemMetrics
        from nvila_platform.tracking import open_tracker

        run = self._run
        parent = parent_run(run.settings, run.run_id)
        if parent is not None:
            run.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(run.directory / TRACKING_RUN_FILE, parent)
        self._tracker = open_tracker(run.settings, self._step, parent, tags={RUN_TAG: run.run_id})
        self._tracker.log_params(step_config(step_spec(self._step), self._recipe))
        self._tracker.log_datasets(datasets_of(self._step, self._inputs, open_store(run.settings)))
        self._load = SystemMetrics(self._tracker.log_metrics, run.settings.system_metrics_s)
        self._load.start()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if self._tracker is None:
            return
        self._load.stop()
        ref = self._run.results().get(self._step)
        if kind is None and ref is not None:
            from nvila_platform.pipeline_runs import REUSED_TAG

            manifest = open_store(self._run.settings).manifest(ref)
            self._tracker.log_metrics(dict(manifest.metrics))
            reused = {REUSED_TAG: "true"} if manifest.started_at < self._began else {}
            self._tracker.set_tags({"nvila.digest": ref.digest} | reused)
        self._tracker.close("FINISHED" if kind is None else "FAILED")
