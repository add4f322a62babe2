"""Running the lifecycle on this machine: the whole compiled pipeline, or its steps up to one of them."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from nvila_pipelines.compile import compile_graph
from nvila_pipelines.local_pipeline import run_compiled
from nvila_pipelines.recipe import Recipe
from nvila_pipelines.run_record import RunRecord
from nvila_pipelines.steps.runner import RunContext, run_step, step_key
from nvila_pipelines.steps.table import STEPS, step_spec
from nvila_pipelines.summary import Summary, summarize
from nvila_pipelines.tracking_bridge import Status, TrackingBridge
from nvila_platform.artifacts import storage_errors, write_atomically
from nvila_platform.lineage import trace
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, open_store
from nvila_platform.telemetry import ProgressView, follow


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """One line of a dry run."""

    name: str
    key: str | None
    finished: bool


def run_lifecycle(recipe: Recipe, settings: Settings, *, view: ProgressView) -> Summary:
    """Run the compiled lifecycle with kfp's local runner, track it, and write the report.

    Args:
        recipe: Resolved recipe.
        settings: Workspace, store and tracking.
        view: Draws progress.

    Returns:
        What the run measured, whether or not the gate let the model through.

    Raises:
        NvilaError: A step failed; the same command goes on from there.
    """
    from nvila_pipelines.report import write_report

    started = time.monotonic()
    run = new_run(recipe, settings)
    package = compile_graph("lifecycle", run.directory / "pipeline.yaml")
    with _watched(run, recipe, view) as record:
        arguments = {"recipe": recipe.to_json(), "run_id": run.run_id}
        run_compiled(package, arguments, settings, settings.workspace / "logs" / f"{run.run_id}.log")
    store = open_store(settings)
    artifacts = {name: store.fetch(ref) for name, ref in finished_steps(recipe, settings).items()}
    summary = summarize(run, recipe, artifacts, record.seconds, time.monotonic() - started)
    model = finished_steps(recipe, settings).get("quantize")
    lineage = None if model is None else trace(store, model.digest)
    write_report(artifacts, summary.to_dict(), lineage, run.directory / "report.html")
    summary = summary.finished(time.monotonic() - started)
    write_atomically(run.directory / "summary.json", json.dumps(summary.to_dict(), indent=2) + "\n")
    return summary


def run_until(recipe: Recipe, settings: Settings, step: str, *, view: ProgressView) -> ArtifactRef:
    """Run a step and those it depends on in this process, without the pipeline runner.

    Raises:
        ConfigError: There is no such step.
        NvilaError: A step failed.
    """
    step_spec(step)
    run = new_run(recipe, settings)
    refs: dict[str, ArtifactRef] = {}
    with _watched(run, recipe, view):
        for name in steps_before(step):
            inputs = {key: refs[source] for key, source in STEPS[name].inputs.items()}
            refs[name] = run_step(name, recipe, inputs, run)
    return refs[step]


def steps_before(step: str) -> list[str]:
    """Return a step and all it depends on, in the order of the table."""
    needed = {step}
    for name in reversed(STEPS):
        if name in needed:
            needed |= set(STEPS[name].inputs.values())
    return [name for name in STEPS if name in needed]


def finished_steps(recipe: Recipe, settings: Settings) -> dict[str, ArtifactRef]:
    """Return the finished results of a recipe in the workspace, by step."""
    store = open_store(settings)
    refs: dict[str, ArtifactRef] = {}
    for name, spec in STEPS.items():
        if all(source in refs for source in spec.inputs.values()):
            inputs = {key: refs[source] for key, source in spec.inputs.items()}
            ref = store.lookup(name, step_key(spec, recipe, inputs))
            if ref is not None:
                refs[name] = ref
    return refs


def plan(recipe: Recipe, settings: Settings) -> list[PlannedStep]:
    """Say for every step whether its result exists; the key is unknown while an input is."""
    done = finished_steps(recipe, settings)
    planned = []
    for name, spec in STEPS.items():
        ready = all(source in done for source in spec.inputs.values())
        inputs = {key: done[source] for key, source in spec.inputs.items()} if ready else {}
        key = step_key(spec, recipe, inputs) if ready else None
        planned.append(PlannedStep(name=name, key=key, finished=name in done))
    return planned


def new_run(recipe: Recipe, settings: Settings) -> RunContext:
    """Create the folder of a run and write the resolved recipe into it.

    Raises:
        ConfigError: The workspace cannot be written.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    run = RunContext(run_id=f"{recipe.name}-{stamp}-{uuid.uuid4().hex[:4]}", settings=settings)
    with storage_errors(run.directory):
        run.directory.mkdir(parents=True)
        (run.directory / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        run.events_path.touch()
    return run


@contextmanager
def _watched(run: RunContext, recipe: Recipe, view: ProgressView) -> Iterator[RunRecord]:
    """Draw, time and track a run from its event log, in a thread."""
    record = RunRecord()
    bridge = TrackingBridge(run, recipe)
    stop = threading.Event()

    def watch() -> None:
        for event in follow(run.events_path, stop.is_set):
            view.show(event)
            record.add(event)
            bridge.add(event)

    watcher = threading.Thread(target=watch, name="run-events", daemon=True)
    watcher.start()
    status: Status = "FAILED"
    try:
        yield record
        status = "FINISHED"
    finally:
        stop.set()
        watcher.join()
        bridge.close(status)


__all__ = ["PlannedStep", "Summary", "finished_steps", "new_run", "plan", "run_lifecycle", "run_until", "steps_before"]
