"""Running the lifecycle on this machine: the whole compiled pipeline, or its steps up to one of them."""

from __future__ import annotations

import json
import shutil
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from nvila.errors import NvilaError
from nvila_pipelines.compile import shipped
from nvila_pipelines.evaluation.gate import gate_tags
from nvila_pipelines.local_pipeline import run_compiled
from nvila_pipelines.recipe import Recipe
from nvila_pipelines.run_record import RunRecord
from nvila_pipelines.steps.gate import read_verdict
from nvila_pipelines.steps.runner import RunContext, is_reusable, run_step, step_key
from nvila_pipelines.steps.table import STEPS, step_spec
from nvila_pipelines.summary import Summary, summarize
from nvila_pipelines.tracking_bridge import TrackingBridge
from nvila_pipelines.training.stages import STEP, adopt_stages
from nvila_platform.artifacts import storage_errors, write_atomically
from nvila_platform.lineage import trace
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, open_store
from nvila_platform.system_metrics import SystemMetrics
from nvila_platform.telemetry import EventLog, ProgressView, follow

# What steps that compute with a model in the task's own process import, and the components that run them.
_HEAVY = ("torch", "transformers", "nvila.assembly")
_COMPUTING = {
    "curate": "curate",
    "quantize": "quantize",
    "evaluate-wide": "evaluate",
    "evaluate-quantized": "evaluate",
}
_GPU_DEVICES = ("nvidia*", "kfd", "dxg")


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
    from nvila_pipelines.report import write_plots, write_report

    started = time.monotonic()
    run = new_run(recipe, settings)
    package = Path(shutil.copy(shipped("lifecycle"), run.directory / "pipeline.yaml"))
    with RunWatch(run, recipe, view) as watch:
        arguments = {"recipe": recipe.to_json(), "run_id": run.run_id}
        log = settings.workspace / "logs" / f"{run.run_id}.log"
        with EventLog(run.events_path) as events:
            imports = shared_imports(recipe, settings)
            run_compiled(package, arguments, settings, log, events.notice, imports=imports)
        watch.drain()
        store = open_store(settings)
        refs = run.results()
        artifacts = {name: store.fetch(ref) for name, ref in refs.items()}
        summary = summarize(run, recipe, artifacts, watch.record.seconds, time.monotonic() - started)
        watch.bridge.set_tags(gate_tags(read_verdict(artifacts["gate"])))
        # The step that finished last was made of all the others.
        lineage = trace(store, list(refs.values())[-1].digest)
        watch.bridge.log_report(write_report(artifacts, summary.to_dict(), lineage, run.directory / "report.html"))
        figures = write_plots(artifacts, run.directory / "plots", settings.workspace)
        if figures is not None:
            watch.bridge.log_report(figures)
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
    with RunWatch(run, recipe, view):
        for name in steps_before(step):
            inputs = {key: refs[source] for key, source in STEPS[name].inputs.items()}
            if name == STEP:
                with EventLog(run.events_path, step=name) as events:
                    adopt_stages(recipe, inputs, settings, events)
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
    """Return the finished results of a recipe in the workspace, by step; steps that every run does again have none."""
    store = open_store(settings)
    refs: dict[str, ArtifactRef] = {}
    for name, spec in STEPS.items():
        if all(source in refs for source in spec.inputs.values()):
            inputs = {key: refs[source] for key, source in spec.inputs.items()}
            ref = store.lookup(name, step_key(spec, recipe, inputs))
            if ref is not None:
                refs[name] = ref
    return refs


def shared_imports(recipe: Recipe, settings: Settings) -> dict[str, tuple[str, ...]]:
    """Return what tasks that will compute need, by component, so that it is imported once for all of them.

    Nothing where there is a GPU: no fork may follow what a driver does when it is asked for, and the imports are little
    beside the work there.
    """
    if any(found for pattern in _GPU_DEVICES for found in Path("/dev").glob(pattern)):
        return {}
    try:
        done = finished_steps(recipe, settings)
    except NvilaError:
        # What is wrong with the store is for the step to say that needs it.
        done = {}
    return {component: _HEAVY for step, component in _COMPUTING.items() if step not in done}


def plan(recipe: Recipe, settings: Settings) -> list[PlannedStep]:
    """Say for every step whether its result exists; the key is unknown while an input or the run is."""
    done = finished_steps(recipe, settings)
    planned = []
    for name, spec in STEPS.items():
        ready = all(source in done for source in spec.inputs.values())
        inputs = {key: done[source] for key, source in spec.inputs.items()} if ready else {}
        key = step_key(spec, recipe, inputs) if ready and is_reusable(spec, recipe) else None
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


class RunWatch:
    """Draws, times and tracks a run from its event log, in a thread, for the time of a `with` block.

    Args:
        run: The run.
        recipe: Its recipe.
        view: Draws progress.
    """

    def __init__(self, run: RunContext, recipe: Recipe, view: ProgressView) -> None:
        self.record = RunRecord()
        self.bridge = TrackingBridge(run, recipe)
        self._load = SystemMetrics(self.bridge.log_load, run.settings.system_metrics_s)
        self._view = view
        self._events = run.events_path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="run-events", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._load.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self.drain()
        self._load.stop()
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.bridge.close("FINISHED" if kind is None else "FAILED" if not interrupted else "KILLED")

    def drain(self) -> None:
        """Take the events that are still in the log; call it when nothing writes to it any more."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        for event in follow(self._events, self._stop.is_set):
            self._view.show(event)
            self.record.add(event)
            self.bridge.add(event)
