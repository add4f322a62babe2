"""The first task of a graph: parameters that are wrong end the run in seconds, with the name of the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nvila.errors import ConfigError
from nvila_pipelines.recipe import Recipe, changed_recipe, load_recipe
from nvila_pipelines.steps.component import run_task
from nvila_pipelines.steps.pipeline_job import PipelineJob, run_name
from nvila_pipelines.training.nodes import check_nodes, sized
from nvila_platform.settings import Settings, runner_pid


class Checked(NamedTuple):
    """What the other tasks of the graph are given."""

    recipe: str
    run_id: str


def check_run(
    recipe: str,
    overrides: Sequence[str],
    fields: Mapping[str, str],
    job: PipelineJob,
    run_id: str = "",
    size: str = "0x0",
) -> Checked:
    """Resolve a recipe and name the run.

    Args:
        recipe: Name, or a resolved recipe as JSON.
        overrides: `dotted.key=value` words.
        fields: Values by dotted key; an empty one leaves the recipe's.
        job: The run in Kubeflow; its run in MLflow, which is made here, links to it.
        run_id: Name that the user gave the run; empty takes Kubeflow's.
        size: NODESxGPUS of the training job.

    Raises:
        SystemExit: A parameter is wrong; the typed error was left for the parent process.
    """
    words = [*overrides, *(f"{name}={value}" for name, value in fields.items() if value)]
    name = run_name(job, run_id)

    def work(settings: Settings) -> Recipe:
        if not name:
            raise ConfigError("the run has no name", "set the parameter run_id")
        resolved = resolve_recipe(recipe, words)
        check_nodes(resolved, sized(settings, size))
        # On this machine the run that started the tasks tells MLflow itself.
        if runner_pid() is None:
            from nvila_platform.pipeline_runs import kubeflow_tags, parent_run

            parent_run(settings, name, kubeflow_tags(settings, job.id))
        return resolved

    found = run_task("check", name, work)
    return Checked(found.to_json(), name)


def resolve_recipe(recipe: str, words: Sequence[str]) -> Recipe:
    """Return a recipe by its name, file or JSON form, with fields changed.

    Raises:
        ConfigError: There is no such recipe, or a field is wrong.
    """
    if recipe.lstrip().startswith("{"):
        return changed_recipe(Recipe.from_json(recipe), words)
    return load_recipe(recipe, words)
