"""Kubeflow component: quantize."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl
from kfp.dsl import Dataset, Input, Markdown, Metrics, Model, Output

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def quantize(
    recipe: str,
    run_id: str,
    data: Input[Dataset],
    model: Input[Model],
    metrics: Output[Metrics],
    report: Output[Markdown],
    result: Output[Model],
) -> None:
    """Quantize the parts of the model as the recipe says, calibrated and measured on the data.

    Args:
        recipe: The resolved recipe as JSON.
        run_id: Run that this task belongs to.
        data: The data set, to calibrate on.
        model: The trained model.
        metrics: Numbers of the step.
        report: What the step found, as tables.
        result: Reference to the quantized model in the artifact store.
    """
    from nvila_pipelines.steps.component import run_component

    run_component("quantize", recipe, run_id, {"data": data.path, "model": model.path}, result, metrics, report)
