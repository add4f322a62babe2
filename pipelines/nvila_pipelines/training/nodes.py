"""Where training runs: processes of this machine, or the nodes of a cluster, behind one interface."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from nvila.errors import ConfigError
from nvila_pipelines.recipe_training import batch_advice
from nvila_platform.cluster.placement import JobPlacement
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from nvila_pipelines.recipe import Recipe
    from nvila_platform.launch import Launcher


def job_placement(settings: Settings) -> JobPlacement | None:
    """Return the nodes that training runs on, or None when it runs on this machine.

    Raises:
        ConfigError: A field of them is wrong, or several nodes are asked of this machine.
    """
    if settings.train_job:
        return JobPlacement.from_json(settings.train_job, nodes=settings.train_nodes, gpus=settings.train_gpus)
    if (settings.train_nodes or 1) > 1:
        raise ConfigError(
            f"{settings.train_nodes} nodes are asked for, but training runs on this machine",
            "give train the launcher trainjob in a profile, or ask for one node",
        )
    return None


def parse_size(size: str) -> tuple[int | None, int | None]:
    """Return nodes and GPUs of each, where 0 means that nobody chose.

    Raises:
        ConfigError: It is not written as NODESxGPUS.

    Example:
        >>> parse_size("4x0")
        (4, None)
    """
    # kfp's local runner writes whole numbers with a fraction.
    match = re.fullmatch(r"(-?[0-9]+)(?:\.0)?x(-?[0-9]+)(?:\.0)?", size)
    if match is None:
        raise ConfigError(f"size {size!r} is not NODESxGPUS", "write it as 4x8")
    numbers = (int(match[1]), int(match[2]))
    for field, number in zip(("nodes", "gpus_per_node"), numbers, strict=True):
        if number < 0:
            raise ConfigError(
                f"parameter {field}={number} is negative", "use 1 or more, or 0 for what the profile says"
            )
    return numbers[0] or None, numbers[1] or None


def sized(settings: Settings, size: str) -> Settings:
    """Return settings with the nodes and GPUs of a run's parameters; see `parse_size`."""
    nodes, gpus = parse_size(size)
    return replace(settings, train_nodes=nodes or settings.train_nodes, train_gpus=gpus or settings.train_gpus)


def check_nodes(recipe: Recipe, settings: Settings) -> int:
    """Check that the recipe's batches can be dealt to the nodes, and return the processes of each node.

    Raises:
        ConfigError: They cannot, or the backend is for one process.
    """
    placement, section = job_placement(settings), recipe.train
    gpus = settings.train_gpus if placement is None else placement.gpus
    each = gpus or section.num_processes
    nodes = 1 if placement is None else placement.nodes
    world = nodes * each
    if world > 1 and section.backend == "torch":
        raise ConfigError(
            f"train.backend=torch is one process, but {nodes} nodes with {each} each are asked for",
            "set train.backend=deepspeed",
        )
    for name, stage in section.stages.items():
        if advice := batch_advice(stage.images_per_step or 0, world):
            raise ConfigError(
                f"train.stages.{name}.images_per_step={stage.images_per_step} cannot be dealt to "
                f"{nodes} nodes with {each} processes each",
                advice,
            )
    return each


def open_launcher(settings: Settings, work: str, say: Callable[[str], None], run_id: str = "") -> Launcher:
    """Return what starts the processes of training.

    Args:
        settings: Say where.
        work: What is trained, which two jobs never do at once.
        say: Told what a job waits for.
        run_id: Of the run whose end takes away a job that was left; empty for none.
    """
    placement = job_placement(settings)
    if placement is None:
        from nvila_platform.launch import LocalLauncher

        return LocalLauncher()
    from nvila_platform.cluster.connection import in_pod
    from nvila_platform.launch.train_job import TrainJobLauncher

    # In a pod standard error is what the Kubeflow UI shows; on a terminal it is where progress is drawn.
    noted = (settings.workspace, run_id) if run_id else None
    return TrainJobLauncher(placement, work, say, echo=sys.stderr if in_pod() else None, noted=noted)
