"""Kubeflow component: finish, the exit handler of every graph."""

# Annotations are read at definition time, so they must not be postponed in this file.
from kfp import dsl

from nvila_pipelines.components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def finish(
    run_id: str,
    job: str,
    status: dsl.PipelineTaskFinalStatus,
) -> None:
    """Record how the run ended, whatever happened, and remove what its tasks left behind.

    Args:
        run_id: Name of the run; empty takes Kubeflow's.
        job: Name that Kubeflow gave the run.
        status: How the run ended; Kubeflow fills it in.
    """
    from nvila_pipelines.steps.finish import finish_run

    finish_run(run_id or job, status.state, status.error_message or "", followed=bool(run_id))
