"""From a run's events to MLflow: one parent run, one nested run for every step, metrics as they come."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.runner import FINISHED, REUSED, TRACKING_RUN_FILE, RunContext, step_config
from nvila_pipelines.steps.table import STEPS
from nvila_pipelines.tracked_data import datasets_of
from nvila_platform.artifacts import write_atomically
from nvila_platform.cost import of_lifecycle, usage_of
from nvila_platform.store import open_store
from nvila_platform.telemetry import Event
from nvila_platform.tracking import Tracker, open_tracker

Status = Literal["FINISHED", "FAILED", "KILLED"]

# For all trackers together, and for each when that is used up.
_CLOSE_S = 30.0
_LEAST_CLOSE_S = 0.5


class TrackingBridge:
    """Tracks a run from its events, so that steps need no MLflow and an outage cannot touch them.

    Args:
        run: The run.
        recipe: Its recipe, logged as parameters.
    """

    def __init__(self, run: RunContext, recipe: Recipe) -> None:
        self._run = run
        self._recipe = recipe
        self._parent = open_tracker(run.settings, run.run_id, tags={"nvila.run_id": run.run_id})
        self._parent.log_params({"recipe": recipe.name, "seed": recipe.seed})
        self._steps: dict[str, Tracker] = {}
        self._finished: list[Tracker] = []
        self._datasets: set[tuple[str, str]] = set()
        self._used: list[dict[str, float]] = []
        self._known = False

    def add(self, event: Event) -> None:
        """Take one event."""
        self._publish_run_id()
        if event.notice or event.phase == REUSED:
            return
        tracker = self._steps.get(event.step)
        if tracker is None:
            tracker = self._steps[event.step] = self._open(event.step)
            self._log_datasets(event.step, tracker)
        metrics = {name: value for name, value in event.metrics.items() if math.isfinite(value)}
        if event.phase == FINISHED:
            tracker.log_metrics(metrics)
            self._used.append(usage_of(metrics))
            self._parent.log_metrics({f"{event.step}/{name}": value for name, value in metrics.items()})
            # Not closed yet: that waits for MLflow, which may still be starting.
            tracker.finish("FINISHED")
            self._finished.append(self._steps.pop(event.step))
        elif metrics:
            tracker.log_metrics({f"{event.phase}/{name}": value for name, value in metrics.items()}, step=event.done)

    def log_report(self, path: Path) -> None:
        """Attach a file or folder, such as the report, to the parent run."""
        self._parent.log_artifact(path)

    def log_load(self, values: Mapping[str, float], sample: int) -> None:
        """Take a measurement of the machine, for the run and for the steps that are under way; from any thread."""
        for tracker in (self._parent, *list(self._steps.values())):
            tracker.log_metrics(values, step=sample)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Tag the parent run."""
        self._parent.set_tags(tags)

    def close(self, status: Status) -> None:
        """Sum up what the steps used, end the runs that are still open and give MLflow some time for what is left."""
        if used := of_lifecycle(self._used):
            self._parent.log_metrics(used)
        deadline = time.monotonic() + _CLOSE_S
        for tracker in (*self._finished, *self._steps.values(), self._parent):
            tracker.close(status, timeout_s=max(_LEAST_CLOSE_S, deadline - time.monotonic()))

    def _open(self, step: str) -> Tracker:
        tracker = open_tracker(
            self._run.settings, step, parent_run_id=self._parent.handle, tags={"nvila.run_id": self._run.run_id}
        )
        if step in STEPS:
            tracker.log_params(step_config(STEPS[step], self._recipe))
        return tracker

    def _log_datasets(self, step: str, tracker: Tracker) -> None:
        results = self._run.results()
        wired = STEPS[step].inputs if step in STEPS else {}
        inputs = {name: results[source] for name, source in wired.items() if source in results}
        datasets = datasets_of(step, inputs, open_store(self._run.settings))
        tracker.log_datasets(datasets)
        new = [one for one in datasets if (one.digest, one.context) not in self._datasets]
        self._datasets |= {(one.digest, one.context) for one in new}
        self._parent.log_datasets(new)

    def _publish_run_id(self) -> None:
        """Leave the parent's id where the register step finds it, once MLflow has given one."""
        if not self._known and self._parent.run_id is not None:
            self._known = True
            write_atomically(self._run.directory / TRACKING_RUN_FILE, self._parent.run_id)
