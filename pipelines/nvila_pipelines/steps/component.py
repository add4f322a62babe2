"""What the body of every Kubeflow component calls.

The artifacts that Kubeflow passes between tasks are small files with a reference into the artifact store, so results
of any size are neither copied nor packed on their way.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from nvila.errors import InfrastructureError, NvilaError
from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.runner import RunContext, run_step
from nvila_platform.launch.child import collect_rarely, die_with, die_with_parent
from nvila_platform.launch.outcome import leave_error
from nvila_platform.launch.stopping import GO_ON, Terminated, stoppable_task
from nvila_platform.settings import Settings, runner_pid, tasks_folder
from nvila_platform.store import ArtifactRef, open_store
from nvila_platform.telemetry import configure_logging


class OutputArtifact(Protocol):
    """The part of a Kubeflow output artifact that is written here."""

    path: str
    metadata: dict[str, Any]


def run_component(step: str, recipe: str, run_id: str, inputs: Mapping[str, str], result: OutputArtifact) -> Path:
    """Run a step inside a Kubeflow task and write the reference to its result.

    Args:
        step: Step in the table.
        recipe: Resolved recipe as JSON.
        run_id: Run that the task belongs to.
        inputs: Files with references, by input name.
        result: Output artifact that gets the reference.

    Returns:
        The local directory of the result.

    Raises:
        SystemExit: The step failed with a typed error, which was left for the parent process; or it was stopped.
    """
    # When the run is killed its tasks must not go on alone. The parent is a shell that would outlive the run.
    die_with_parent(signal.SIGKILL, os.getppid())
    if (runner := runner_pid()) is not None:
        die_with(runner)
    collect_rarely()
    settings = Settings.load()
    configure_logging(settings.log_format, context={"run_id": run_id, "step": step})
    try:
        refs = {name: ArtifactRef.from_json(Path(path).read_text(encoding="utf-8")) for name, path in inputs.items()}
        with stoppable_task(tasks_folder()):
            ref = run_step(step, Recipe.from_json(recipe), refs, RunContext(run_id=run_id, settings=settings))
            directory = open_store(settings).fetch(ref)
    except Terminated as e:
        stopped = InfrastructureError(f"step {step} was stopped by SIGTERM", GO_ON)
        leave_error(stopped)
        raise SystemExit(stopped.exit_code) from e
    except NvilaError as e:
        leave_error(e)
        raise SystemExit(e.exit_code) from e
    target = Path(result.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(ref.to_json(), encoding="utf-8")
    result.metadata.update(json.loads(ref.to_json()))
    return directory
