"""Kubeflow component: evaluate_model."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl
from kfp.dsl import Artifact, Markdown, Metrics, Output

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate_model(
    model: str,
    tasks: str,
    options: list[str],
    job: str,
    job_id: str,
    metrics: Output[Metrics],
    report: Output[Markdown],
    result: Output[Artifact],
) -> None:
    """Measure a model, or an endpoint as its clients see it, on benchmark tasks.

    Args:
        model: Address of an OpenAI endpoint, models:/NAME@ALIAS, or a folder that the task sees.
        tasks: Names and tags of tasks, separated by commas.
        options: More words of `nvila evaluate`.
        job: Name of the run in Kubeflow; its run in MLflow is the parent of this task's.
        job_id: Its id.
        metrics: Scores by task.
        report: The same as a table.
        result: What the command said, as JSON.
    """
    from nvila_pipelines.steps.pipeline_job import PipelineJob
    from nvila_pipelines.steps.verb import run_verb

    run_verb("evaluate", [model, "--tasks", tasks, *options], PipelineJob(name=job, id=job_id), metrics, report, result)
