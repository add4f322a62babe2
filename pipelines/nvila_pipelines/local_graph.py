"""Running any compiled graph on this machine, and keeping what the Kubeflow UI would show of it."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nvila_pipelines.compile import shipped
from nvila_pipelines.lifecycle import RunWatch, new_run, shared_imports
from nvila_pipelines.local_pipeline import run_compiled
from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.check import resolve_recipe
from nvila_pipelines.steps.runner import RunContext
from nvila_platform.artifacts import storage_errors
from nvila_platform.settings import Settings
from nvila_platform.telemetry import EventLog, ProgressView

TASKS_FOLDER = "tasks"


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRun:
    """A graph that was run here.

    Args:
        run_id: Name of the run.
        directory: Its folder: what each task wrote is under `tasks/`.
    """

    run_id: str
    directory: Path


def run_graph(graph: str, arguments: Mapping[str, Any], settings: Settings, view: ProgressView) -> GraphRun:
    """Run a graph from its compiled form, with KFP's local runner.

    Args:
        graph: Name of a graph.
        arguments: Its parameters, checked against what it declares.
        settings: Workspace, store and tracking.
        view: Draws progress.

    Raises:
        NvilaError: A task failed; what the tasks before it made is reused by the next run.
    """
    package = shipped(graph)
    recipe = _recipe(arguments) if graph in ("lifecycle", "train") else None
    run = new_run(recipe, settings) if recipe is not None else _new_run(graph, settings)
    given = dict(arguments) | ({"run_id": run.run_id} if recipe is not None else {})
    shutil.copy(package, run.directory / "pipeline.yaml")
    log = settings.workspace / "logs" / f"{run.run_id}.log"
    with (
        RunWatch(run, recipe, view) if recipe is not None else nullcontext(),
        EventLog(run.events_path, step=graph) as events,
    ):
        imports = {} if recipe is None else shared_imports(recipe, settings)
        run_compiled(package, given, settings, log, events.notice, keep=run.directory / TASKS_FOLDER, imports=imports)
    return GraphRun(run_id=run.run_id, directory=run.directory)


def _recipe(arguments: Mapping[str, Any]) -> Recipe:
    fields = {"seed": "seed", "gate.min_accuracy": "min_accuracy", "register.name": "register_as"}
    values = {field: str(arguments.get(name, "")) for field, name in fields.items()}
    words = [*arguments.get("overrides", ()), *(f"{field}={value}" for field, value in values.items() if value)]
    return resolve_recipe(str(arguments.get("recipe", "quickstart")), words)


def _new_run(graph: str, settings: Settings) -> RunContext:
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    run = RunContext(run_id=f"{graph}-{stamp}-{uuid.uuid4().hex[:4]}", settings=settings)
    with storage_errors(run.directory):
        run.directory.mkdir(parents=True)
        run.events_path.touch()
    return run
