"""Kubeflow component: tune_model."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl
from kfp.dsl import Markdown, Metrics, Model, Output

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def tune_model(
    model: str,
    data: str,
    method: str,
    register_as: str,
    options: list[str],
    job: str,
    job_id: str,
    metrics: Output[Metrics],
    report: Output[Markdown],
    result: Output[Model],
) -> str:
    """Tune a model on data of your own and register it as `candidate`.

    Args:
        model: Base: models:/NAME@ALIAS, or a folder that the task sees.
        data: File, folder, s3:// address or mixture of image-text samples.
        method: How vision and language part are tuned, such as ln+lora.
        register_as: Name in the model registry.
        options: More words of `nvila tune`.
        job: Name of the run in Kubeflow; its run in MLflow is the parent of this task's.
        job_id: Its id.
        metrics: Scores before and after.
        report: The same as a table.
        result: Reference to the tuned model in the artifact store.

    Returns:
        Address of the registered version.
    """
    from nvila_pipelines.steps.pipeline_job import PipelineJob
    from nvila_pipelines.steps.verb import run_verb

    words = [model, data, "--method", method, "--name", register_as, *options]
    return str(run_verb("tune", words, PipelineJob(name=job, id=job_id), metrics, report, result)["model"])
