"""Kubeflow component: curate."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Metrics, Output

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def curate(
    recipe: str,
    run_id: str,
    data: Input[Dataset],
    metrics: Output[Metrics],
    report: Output[HTML],
    result: Output[Dataset],
) -> None:
    """Score every sample with two models and keep the most informative half of every source (DeltaLoss).

    Args:
        recipe: The resolved recipe as JSON.
        run_id: Run that this task belongs to.
        data: The data set to curate.
        metrics: Numbers of the step.
        report: What was kept of every source, as histograms of DeltaLoss.
        result: Reference to scores and selection in the artifact store.
    """
    from nvila_pipelines.steps.component import run_component

    run_component("curate", recipe, run_id, {"data": data.path}, result, metrics, report)
