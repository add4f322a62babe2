"""Kubeflow component: quantize."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl
from kfp.dsl import Input, Model, Output

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def quantize(
    recipe: str,
    run_id: str,
    model: Input[Model],
    result: Output[Model],
) -> None:
    """Quantize the vision tower to W8A8 and the language model to 4-bit weights.

    Args:
        recipe: The resolved recipe as JSON.
        run_id: Run that this task belongs to.
        model: The trained model.
        result: Reference to the quantized model in the artifact store.
    """
    from nvila_pipelines.steps.component import run_component

    run_component("quantize", recipe, run_id, {"model": model.path}, result)
