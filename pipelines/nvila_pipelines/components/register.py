"""Kubeflow component: register."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl
from kfp.dsl import Artifact, Input, Markdown, Metrics, Model, Output

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register(
    recipe: str,
    run_id: str,
    model: Input[Model],
    verdict: Input[Artifact],
    metrics: Output[Metrics],
    report: Output[Markdown],
    result: Output[Artifact],
) -> None:
    """Register the model in MLflow by reference and move the alias to it.

    Args:
        recipe: The resolved recipe as JSON.
        run_id: Run that this task belongs to.
        model: The quantized model.
        verdict: The verdict of the gate.
        metrics: Numbers of the step.
        report: What the step found, as tables.
        result: Reference to name, version and alias in the artifact store.
    """
    from nvila_pipelines.steps.component import run_component

    run_component("register", recipe, run_id, {"model": model.path, "verdict": verdict.path}, result, metrics, report)
