"""A step of a recipe in a pod of its own: its progress in the pod's log, and its run in MLflow.

On one machine the run's watcher does both from the event log; in a pod nobody else follows it.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.runner import FINISHED, REUSED, TRACKING_RUN_FILE, RunContext, step_config
from nvila_pipelines.steps.table import step_spec
from nvila_pipelines.tracked_data import datasets_of
from nvila_platform.artifacts import utc_now, write_atomically
from nvila_platform.settings import runner_pid
from nvila_platform.store import ArtifactRef, open_store
from nvila_platform.telemetry import Event, ProgressView, follow

logger = logging.getLogger(__name__)

_SHOWN = "shown"


class PodTracking:
    """Follows one step for the time of a `with` block; does nothing where the task is part of a run on one machine.

    Args:
        step: Step in the table.
        recipe: Logged as parameters, as far as the step depends on it.
        inputs: Its inputs, logged as data sets.
        run: The run that it belongs to.
    """

    def __init__(self, step: str, recipe: Recipe, inputs: Mapping[str, ArtifactRef], run: RunContext) -> None:
        self._step, self._recipe, self._inputs, self._run = step, recipe, inputs, run
        self._tracker: Any = None
        self._view: Any = None
        self._load: Any = None
        self._began = utc_now()
        self._ended = threading.Event()
        self._follower = threading.Thread(target=self._follow, name=f"events-{step}", daemon=True)
        self._offset = 0

    def __enter__(self) -> Self:
        if runner_pid() is not None:
            return self
        from rich.console import Console

        from nvila_platform.pipeline_runs import RUN_TAG, parent_run
        from nvila_platform.system_metrics import SystemMetrics
        from nvila_platform.tracking import open_tracker

        # Taken before the tracker's thread starts, whose imports may put another stream in its place for a while.
        # JSON whatever the format of logs is: without a terminal, bars would be drawn once, at the end.
        self._view = ProgressView(Console(file=sys.stderr), format="json")
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
        # Pods may share the workspace: what an earlier try of this step left in the log was told then.
        self._offset = run.events_path.stat().st_size if run.events_path.is_file() else 0
        self._follower.start()
        return self

    def show(self, directory: Path, report: str) -> None:
        """Attach what the Kubeflow UI shows of the step, and of training its plots.

        Args:
            directory: Results of the step.
            report: Markdown, or a page of HTML.
        """
        if self._tracker is None:
            return
        # Not in the task's scratch: during an outage of MLflow they are read after the task.
        folder = self._run.directory / _SHOWN / self._step
        try:
            folder.mkdir(parents=True, exist_ok=True)
            page = folder / f"report.{'html' if report.startswith('<!doctype html>') else 'md'}"
            page.write_text(report, encoding="utf-8")
            self._tracker.log_artifact(page)
            if self._step == "train":
                from nvila_pipelines.report.training_panels import write_plots

                figures = write_plots({self._step: directory}, folder / "plots", self._run.settings.workspace)
                if figures is not None:
                    self._tracker.log_artifact(figures)
        except OSError as e:
            logger.warning("MLflow gets no report of the step %s: %s", self._step, e)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if self._tracker is None:
            return
        self._load.stop()
        self._ended.set()
        self._follower.join()
        ref = self._run.results().get(self._step)
        if kind is None and ref is not None:
            from nvila_platform.pipeline_runs import REUSED_TAG

            manifest = open_store(self._run.settings).manifest(ref)
            self._tracker.log_metrics(dict(manifest.metrics))
            reused = {REUSED_TAG: "true"} if manifest.started_at < self._began else {}
            self._tracker.set_tags({"nvila.digest": ref.digest} | reused)
        self._tracker.close("FINISHED" if kind is None else "FAILED")

    def _follow(self) -> None:
        for event in follow(self._run.events_path, self._ended.is_set, start=self._offset):
            if event.step == self._step:
                self._tell(event)

    def _tell(self, event: Event) -> None:
        try:
            self._view.show(event)
        except (OSError, ValueError):
            logger.debug("the log of the pod takes no progress", exc_info=True)
        if event.notice or event.phase in (FINISHED, REUSED):
            return
        values = {f"{event.phase}/{name}": value for name, value in event.metrics.items() if math.isfinite(value)}
        if values:
            self._tracker.log_metrics(values, step=event.done)
