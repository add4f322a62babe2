"""Training stages one at a time: each starts from the finished folder of the one before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from nvila.errors import ConfigError
from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.runner import step_key
from nvila_pipelines.steps.table import STEPS
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, open_store

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
    if "train" not in finished_steps(recipe.up_to(before), settings):
        raise ConfigError(
            f"stage {stage} starts from stage {before}, which is not trained in {settings.workspace}",
            f"nvila train {recipe.name} --stage {before}, with the same overrides",
        )


def adopt_stages(recipe: Recipe, inputs: Mapping[str, ArtifactRef], settings: Settings, out_dir: Path) -> list[str]:
    """Take over the stages that a shorter run of the same recipe has trained, and return their names.

    A stage's result depends on those before it and never on those behind it, so that the folders are what this run
    would make. Files are linked where the file system can do so.
    """
    names = list(recipe.train.stages)
    store = open_store(settings)
    for count in range(len(names) - 1, 0, -1):
        first = f"1-{names[0]}"
        if (out_dir / first).is_dir():
            return []  # an interrupted try of this very run is further
        ref = store.lookup("train", step_key(STEPS["train"], recipe.up_to(names[count - 1]), inputs))
        if ref is None:
            continue
        source = store.fetch(ref)
        for number, name in enumerate(names[:count], start=1):
            folder = f"{number}-{name}"
            shutil.copytree(source / folder, out_dir / folder, copy_function=_link)
        shutil.copyfile(source / _METRICS, out_dir / _METRICS)
        return names[:count]
    return []


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
