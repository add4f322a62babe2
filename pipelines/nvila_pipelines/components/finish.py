"""Kubeflow component: finish, the exit handler of every graph."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def finish(
    run_id: str,
    job: str,
    job_id: str,
    status: dsl.PipelineTaskFinalStatus,
) -> None:
    """Record how the run ended, whatever happened; end the job and the runs in MLflow that killed tasks left.

    Args:
        run_id: Name of the run; empty takes Kubeflow's, with the beginning of the id.
        job: Name of the run in Kubeflow.
        job_id: Its id.
        status: How the run ended; Kubeflow fills it in.
    """
    from nvila_pipelines.steps.finish import finish_run
    from nvila_pipelines.steps.pipeline_job import PipelineJob, run_name

    name = run_name(PipelineJob(name=job, id=job_id), run_id)
    finish_run(name, status.state, status.error_message or "", followed=bool(run_id))
