"""Kubeflow component: check."""

# Annotations are read at definition time, so they must not be postponed in this file.
from typing import List, NamedTuple  # noqa: UP035  # kfp reads these forms

from kfp import dsl

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def check(
    recipe: str,
    job: str,
    job_id: str,
    run_id: str = "",
    overrides: List[str] = [],  # noqa: B006, UP006  # a default of the form; nobody changes it
    seed: str = "",
    min_accuracy: str = "",
    register_as: str = "",
    size: str = "0x0",
) -> NamedTuple("Checked", [("recipe", str), ("run_id", str)]):  # type: ignore[valid-type]  # the form that kfp reads
    """Check every parameter of the run before anything is worked on, and resolve the recipe.

    Args:
        recipe: Name of a built-in recipe, or a resolved recipe as JSON.
        job: Name of the run in Kubeflow.
        job_id: Its id.
        run_id: Name of the run; empty takes Kubeflow's, with the beginning of the id.
        overrides: Fields of the recipe to change, such as train.precision=bf16.
        seed: Seed of everything that is drawn; empty leaves the recipe's.
        min_accuracy: Accuracy that the gate asks for; empty leaves the recipe's.
        register_as: Name in the model registry.
        size: NODESxGPUS of the training job, such as 4x8; 0 leaves what the profile says.

    Returns:
        The resolved recipe as JSON, and the name of the run.
    """
    from nvila_pipelines.steps.check import check_run
    from nvila_pipelines.steps.pipeline_job import PipelineJob

    fields = {"seed": seed, "gate.min_accuracy": min_accuracy, "register.name": register_as}
    return check_run(recipe, overrides, fields, PipelineJob(name=job, id=job_id), run_id, size)
