"""Kubeflow component: gate_model."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl
from kfp.dsl import Artifact, Markdown, Metrics, Output

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gate_model(
    model: str,
    policy: str,
    options: list[str],
    job: str,
    job_id: str,
    metrics: Output[Metrics],
    report: Output[Markdown],
    result: Output[Artifact],
) -> bool:
    """Apply a policy to a model and say whether it may be released.

    Args:
        model: models:/NAME@ALIAS, or a folder that the task sees.
        policy: The policy as YAML text (`nvila gate --help` shows one).
        options: More words of `nvila gate`.
        job: Name of the run in Kubeflow; its run in MLflow is the parent of this task's.
        job_id: Its id.
        metrics: Numbers of the verdict.
        report: The verdict as a table.
        result: The verdict as JSON.

    Returns:
        Whether the model passed.
    """
    from nvila_pipelines.steps.pipeline_job import PipelineJob
    from nvila_pipelines.steps.verb import run_gate_verb

    return run_gate_verb(model, policy, options, PipelineJob(name=job, id=job_id), metrics, report, result)
