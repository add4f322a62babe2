"""Kubeflow component: train."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Metrics, Model, Output

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    recipe: str,
    run_id: str,
    data: Input[Dataset],
    selection: Input[Dataset],
    size: str,
    metrics: Output[Metrics],
    report: Output[HTML],
    result: Output[Model],
) -> None:
    """Train the stages of the recipe with DeepSpeed.

    Args:
        recipe: The resolved recipe as JSON.
        run_id: Run that this task belongs to.
        data: The data set with images and captions.
        selection: The samples that curation kept.
        size: NODESxGPUS of the training job, such as 4x8; 0 leaves what the profile says.
        metrics: Numbers of the step.
        report: Loss curves of the stages.
        result: Reference to the trained model, with every stage in the artifact store.
    """
    from nvila_pipelines.steps.component import run_component

    inputs = {"data": data.path, "selection": selection.path}
    run_component("train", recipe, run_id, inputs, result, metrics, report, size=size)
