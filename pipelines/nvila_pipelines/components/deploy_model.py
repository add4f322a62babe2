"""Kubeflow component: deploy_model."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl
from kfp.dsl import Artifact, Markdown, Metrics, Output

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def deploy_model(
    model: str,
    name: str,
    alias: str,
    policy: str,
    options: list[str],
    job: str,
    job_id: str,
    metrics: Output[Metrics],
    report: Output[Markdown],
    result: Output[Artifact],
) -> bool:
    """Roll a registered model out to an endpoint; what a policy limits takes it back.

    Args:
        model: models:/NAME@ALIAS.
        name: Endpoint on the cluster.
        alias: Alias of the registry that it gets once it serves.
        policy: The policy as YAML text; its section `live` decides about every step, without one all traffic moves.
        options: More words of `nvila deploy`.
        job: Name of the run in Kubeflow; its run in MLflow is the parent of this task's.
        job_id: Its id.
        metrics: Numbers of the last verdict.
        report: Every step's verdict as a table.
        result: The outcome as JSON.

    Returns:
        Whether the model serves.
    """
    from nvila_pipelines.steps.pipeline_job import PipelineJob
    from nvila_pipelines.steps.verb import run_deploy_verb

    return run_deploy_verb(
        model, name, policy, ["--alias", alias, *options], PipelineJob(name=job, id=job_id), metrics, report, result
    )
