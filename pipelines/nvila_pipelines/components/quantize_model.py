"""Kubeflow component: quantize_model."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl
from kfp.dsl import Markdown, Metrics, Model, Output

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def quantize_model(
    model: str,
    data: str,
    register_as: str,
    options: list[str],
    job: str,
    job_id: str,
    metrics: Output[Metrics],
    report: Output[Markdown],
    result: Output[Model],
) -> str:
    """Quantize a registered model, calibrated on data, and register the result as `candidate`.

    Args:
        model: Wide model: models:/NAME@ALIAS, or a folder that the task sees.
        data: Samples to calibrate and measure on; empty rounds to nearest and measures nothing.
        register_as: Name in the model registry.
        options: More words of `nvila quantize`.
        job: Name of the run in Kubeflow; its run in MLflow is the parent of this task's.
        job_id: Its id.
        metrics: Sizes, losses and speeds.
        report: The same as a table.
        result: Reference to the quantized model in the artifact store.

    Returns:
        Address of the registered version by number: its alias may move while it is judged.
    """
    from nvila_pipelines.steps.pipeline_job import PipelineJob
    from nvila_pipelines.steps.verb import run_verb

    words = [model, *(["--data", data] if data else []), "--register", f"{register_as}@candidate", *options]
    return str(run_verb("quantize", words, PipelineJob(name=job, id=job_id), metrics, report, result)["version"])
