"""Kubeflow component: gate."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl
from kfp.dsl import Artifact, Input, Markdown, Metrics, Output

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gate(
    recipe: str,
    run_id: str,
    wide: Input[Artifact],
    quantized: Input[Artifact],
    metrics: Output[Metrics],
    report: Output[Markdown],
    result: Output[Artifact],
) -> bool:
    """Decide whether the quantized model may be registered.

    Args:
        recipe: The resolved recipe as JSON.
        run_id: Run that this task belongs to.
        wide: The evaluation of the wide model.
        quantized: The evaluation of the quantized model.
        metrics: Numbers of the step.
        report: What the step found, as tables.
        result: Reference to the verdict in the artifact store.

    Returns:
        Whether the model may go on.
    """
    from nvila_pipelines.steps.component import run_component
    from nvila_pipelines.steps.gate import passed

    return passed(
        run_component("gate", recipe, run_id, {"wide": wide.path, "quantized": quantized.path}, result, metrics, report)
    )
