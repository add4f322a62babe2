"""Kubeflow component: serve."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Markdown, Metrics, Model, Output

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def serve(
    recipe: str,
    run_id: str,
    data: Input[Dataset],
    model: Input[Model],
    registration: Input[Artifact],
    metrics: Output[Metrics],
    report: Output[Markdown],
    result: Output[Artifact],
) -> None:
    """Serve the registered model and ask it test questions over HTTP.

    Args:
        recipe: The resolved recipe as JSON.
        run_id: Run that this task belongs to.
        data: The data set with test questions.
        model: The quantized model.
        registration: The registered version.
        metrics: Numbers of the step.
        report: What the step found, as tables.
        result: Reference to questions and answers in the artifact store.
    """
    from nvila_pipelines.steps.component import run_component

    run_component(
        "serve",
        recipe,
        run_id,
        {"data": data.path, "model": model.path, "registration": registration.path},
        result,
        metrics,
        report,
    )
