"""What a step function is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nvila.progress import Reporter
from nvila_pipelines.recipe import Recipe
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """Inputs, configuration and surroundings of one run of a step.

    Args:
        inputs: Verified directories by input name.
        refs: The same inputs as references, for steps that pass them on.
        recipe: The resolved recipe; a step reads the sections that its row in the table names.
        options: Fixed options of the row.
        out_dir: Where results go; files of an earlier, interrupted try are still there.
        log_path: File for the output of child processes.
        events_path: Event log of the run, for child processes that report progress themselves.
        reporter: Receives progress.
        settings: Settings of this process.
        tracking_run: Id of the pipeline's run in MLflow, when known.
    """

    inputs: Mapping[str, Path]
    refs: Mapping[str, ArtifactRef]
    recipe: Recipe
    options: Mapping[str, str]
    out_dir: Path
    log_path: Path
    events_path: Path
    reporter: Reporter
    settings: Settings
    tracking_run: str | None
