"""Training stages one at a time: each starts from the finished folder of the one before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from nvila.errors import ConfigError
from nvila.progress import Reporter
from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.runner import step_key
from nvila_pipelines.steps.table import STEPS
from nvila_platform.artifacts import storage_errors
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, open_store

STEP = "train"
_METRICS = "metrics.jsonl"


def check_predecessor(recipe: Recipe, stage: str, settings: Settings) -> None:
    """Check that the stage before one is trained.

    Raises:
        ConfigError: It is not, or there is no such stage; the message has the command that trains it.
    """
    names = list(recipe.up_to(stage).train.stages)
    if len(names) < 2:
        return
    from nvila_pipelines.lifecycle import finished_steps

    before = names[-2]
    if STEP not in finished_steps(recipe.up_to(before), settings):
        raise ConfigError(
            f"stage {stage} starts from stage {before}, which is not trained in {settings.workspace}",
            f"nvila train {recipe.name} --stage {before}, with the same overrides",
        )


def adopt_stages(recipe: Recipe, inputs: Mapping[str, ArtifactRef], settings: Settings, reporter: Reporter) -> None:
    """Take over the stages that a shorter run of the same recipe has trained, before the step begins.

    A stage's result depends on those before it and never on those behind it, so that the folders are what this run
    would make. Files are linked where the file system can do so.

    Args:
        recipe: The run to come.
        inputs: Inputs of its training.
        settings: Where artifacts are.
        reporter: Told what was taken over.
    """
    names = list(recipe.train.stages)
    store = open_store(settings)
    key = step_key(STEPS[STEP], recipe, inputs)
    with store.lock(STEP, key, reporter):
        out = store.work_dir(STEP, key)
        if any(out.iterdir()):
            return  # finished, or an interrupted try of this very run
        for count in range(len(names) - 1, 0, -1):
            ref = store.lookup(STEP, step_key(STEPS[STEP], recipe.up_to(names[count - 1]), inputs))
            if ref is None:
                continue
            source = store.fetch(ref)
            with storage_errors(out):
                for number, name in enumerate(names[:count], start=1):
                    _copy_whole(source / f"{number}-{name}", out / f"{number}-{name}")
                shutil.copyfile(source / _METRICS, out / _METRICS)
            reporter.notice(f"taken over from a shorter run: {', '.join(names[:count])}")
            return


def _copy_whole(source: Path, target: Path) -> None:
    """Copy a folder under another name and rename it: one that has its name is complete."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link)
    partial.rename(target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
