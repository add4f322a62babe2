"""Kubeflow component: data."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl
from kfp.dsl import Dataset, Markdown, Metrics, Output

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def data(
    recipe: str,
    run_id: str,
    metrics: Output[Metrics],
    report: Output[Markdown],
    result: Output[Dataset],
) -> None:
    """Bring the data set of the recipe into records, captions and one image table.

    Args:
        recipe: The resolved recipe as JSON.
        run_id: Run that this task belongs to.
        metrics: Numbers of the step.
        report: What the step found, as tables.
        result: Reference to the data set in the artifact store.
    """
    from nvila_pipelines.steps.component import run_component

    run_component("data", recipe, run_id, {}, result, metrics, report)
