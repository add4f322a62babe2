"""Running one step: content key, reuse, lock, work, manifest, publication.

The same function runs a step for a command line verb, for the local pipeline and inside a pod.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.context import StepContext
from nvila_pipelines.steps.table import STEPS, StepSpec, step_spec
from nvila_platform.artifacts import (
    code_version,
    content_key,
    storage_errors,
    utc_now,
    write_atomically,
    write_manifest,
)
from nvila_platform.cost import UsageMeter
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, ArtifactStore, open_store, reuse
from nvila_platform.telemetry import EventLog

EVENTS_FILE = "events.jsonl"
TRACKING_RUN_FILE = "mlflow-run-id"
REUSED, FINISHED = "reused", "finished"
_RESULTS = "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """A run of the pipeline: its id and its folder in the workspace."""

    run_id: str
    settings: Settings

    @property
    def directory(self) -> Path:
        """Folder of the run: event log, recipe, report."""
        return self.settings.workspace / "runs" / self.run_id

    @property
    def events_path(self) -> Path:
        """The run's event log."""
        return self.directory / EVENTS_FILE

    def log_path(self, step: str) -> Path:
        """File for what child processes of a step print."""
        return self.settings.workspace / "logs" / f"{self.run_id}-{step}.log"

    def record(self, ref: ArtifactRef) -> None:
        """Leave the reference to a step's result in the run's folder."""
        path = self.directory / _RESULTS / f"{ref.step}.json"
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, ref.to_json())

    def results(self) -> dict[str, ArtifactRef]:
        """Return the results of the run so far, by step in the order of the table."""
        paths = {name: self.directory / _RESULTS / f"{name}.json" for name in STEPS}
        return {
            name: ArtifactRef.from_json(path.read_text(encoding="utf-8"))
            for name, path in paths.items()
            if path.is_file()
        }

    def tracking_run(self) -> str | None:
        """Return the MLflow run of the pipeline, once the tracker has created it."""
        path = self.directory / TRACKING_RUN_FILE
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def step_config(spec: StepSpec, recipe: Recipe) -> dict[str, Any]:
    """Return the part of a recipe that a step's result depends on."""
    values = recipe.to_dict()
    for name in spec.placement:
        section, _, field = name.rpartition(".")
        del _field(values, section)[field]
    return {name: _field(values, name) for name in spec.sections} | dict(spec.options)


def step_key(spec: StepSpec, recipe: Recipe, inputs: Mapping[str, ArtifactRef], run_id: str = "") -> str:
    """Return the content key of a step's work.

    Args:
        spec: The step.
        recipe: Resolved recipe.
        inputs: Results of earlier steps by input name.
        run_id: Part of the key of a step that is not reusable: each run does it once, in a directory of its own, so
            that a run never takes away what another one is reading.
    """
    digests = {name: ref.digest for name, ref in inputs.items()}
    config = step_config(spec, recipe) | ({} if is_reusable(spec, recipe) else {"run_id": run_id})
    outside = spec.outside_digests(recipe)
    return content_key(spec.name, config | ({"outside": outside} if outside else {}), digests, code_version())


def is_reusable(spec: StepSpec, recipe: Recipe) -> bool:
    """Whether equal work of an earlier run may be taken."""
    return spec.reusable and (not spec.live_field or _field(recipe.to_dict(), spec.live_field) is None)


def run_step(name: str, recipe: Recipe, inputs: Mapping[str, ArtifactRef], run: RunContext) -> ArtifactRef:
    """Make sure that a step's result exists and return it.

    Finished work with the same key is reused after its digests were checked; unfinished work goes on in the same
    directory; a damaged artifact is named, moved aside and made again.

    Args:
        name: Step in the table.
        recipe: Resolved recipe.
        inputs: Results of earlier steps by input name.
        run: The run this belongs to.

    Raises:
        NvilaError: The step failed, or an input is missing or damaged.
    """
    spec = step_spec(name)
    store = open_store(run.settings)
    key = step_key(spec, recipe, inputs, run.run_id)
    # Without the run's id: two runs that register one model do so one after the other.
    alone = step_key(spec, recipe, inputs)
    with EventLog(run.events_path, step=name) as events, store.lock(name, alone, events):
        ref, phase = reuse(store, name, key, events), REUSED
        if ref is None:
            ref, phase = _work(spec, recipe, inputs, run, store, key, events), FINISHED
        run.record(ref)
        events.progress(phase, 1, 1, store.manifest(ref).metrics)
        return ref


def _field(values: Mapping[str, Any], dotted: str) -> Any:
    head, _, rest = dotted.partition(".")
    return _field(values[head], rest) if rest else values[head]


def _work(
    spec: StepSpec,
    recipe: Recipe,
    inputs: Mapping[str, ArtifactRef],
    run: RunContext,
    store: ArtifactStore,
    key: str,
    events: EventLog,
) -> ArtifactRef:
    started_at, meter = utc_now(), UsageMeter(run.settings)
    events.progress("start", 0, 1)
    out_dir = store.work_dir(spec.name, key)
    context = StepContext(
        inputs={name: store.fetch(ref, events) for name, ref in inputs.items()},
        refs=inputs,
        recipe=recipe,
        options=spec.options,
        out_dir=out_dir,
        log_path=run.log_path(spec.name),
        events_path=run.events_path,
        reporter=events,
        settings=run.settings,
        tracking_run=run.tracking_run(),
    )
    with storage_errors(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        metrics = spec.load()(context)
    write_manifest(
        out_dir,
        step=spec.name,
        key=key,
        config=step_config(spec, recipe),
        inputs={name: ref.digest for name, ref in inputs.items()},
        code_version=code_version(),
        started_at=started_at,
        metrics={**metrics, **meter.usage().metrics()},
    )
    return store.publish(out_dir, events)
