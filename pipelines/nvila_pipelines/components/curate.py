"""Kubeflow component: curate."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def curate(
    recipe: str,
    run_id: str,
    data: Input[Dataset],
    result: Output[Dataset],
) -> None:
    """Score every sample with two models and keep the most informative half of every source (DeltaLoss).

    Args:
        recipe: The resolved recipe as JSON.
        run_id: Run that this task belongs to.
        data: The data set to curate.
        result: Reference to scores and selection in the artifact store.
    """
    from nvila_pipelines.steps.component import run_component

    run_component("curate", recipe, run_id, {"data": data.path}, result)
