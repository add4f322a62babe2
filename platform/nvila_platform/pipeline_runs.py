"""The MLflow runs of a pipeline whose tasks are on different machines: one parent, found by the pipeline's own run id.

Nothing here ever fails a task: without MLflow there is no parent, and the task goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from nvila_platform.cost import of_lifecycle, usage_of
from nvila_platform.mlflow_backend import (
    artifact_location,
    configure_environment,
    connect,
    one_line,
    parent_from_environment,
)
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

Ended = Literal["FINISHED", "FAILED", "KILLED"]
RUN_TAG = "nvila.run_id"
KFP_TAG = "nvila.kfp_run_id"
URL_TAG = "nvila.run_url"
# On the run of a step that found its work done: its figures are those of another run.
REUSED_TAG = "nvila.reused"
_PARENT = "mlflow.parentRunId"


def kubeflow_tags(settings: Settings, kfp_run: str) -> dict[str, str]:
    """Return what leads from MLflow to a run in Kubeflow: its id, and its page where the address is known."""
    if not kfp_run:
        return {}
    page = f"{settings.kfp_endpoint}/#/runs/details/{kfp_run}"
    return {KFP_TAG: kfp_run} | ({URL_TAG: page} if settings.kfp_endpoint else {})


def parent_run(settings: Settings, run_id: str, tags: Mapping[str, str] | None = None) -> str | None:
    """Return the MLflow run of a pipeline run; the first task to ask makes it.

    Args:
        settings: Tracking address and experiment.
        run_id: Name of the pipeline run.
        tags: Tags of a new one, or of the one that is given.

    Returns:
        The run that MLFLOW_RUN_ID names, as Kubeflow's own MLflow plugin sets it; else ours. None without MLflow.
    """
    configure_environment()
    given = parent_from_environment()
    if given is not None and not tags:
        return given
    try:
        if given is not None:
            _tag(connect(settings), given, {RUN_TAG: run_id, **(tags or {})})
            return given
        client = connect(settings)
        experiment = _experiment(client, settings)
        named = _runs(client, experiment, f"tags.`{RUN_TAG}` = '{run_id}'")
        parents = [run for run in named if _PARENT not in run.data.tags]
        if parents:
            return str(parents[0].info.run_id)
        made = client.create_run(experiment, tags={RUN_TAG: run_id, **(tags or {})}, run_name=run_id)
        return str(made.info.run_id)
    except Exception as e:  # whatever MLflow, the network or a proxy raises
        logger.warning("this task is tracked without its run: %s", one_line(e))
        return given


def unfinished_tasks(settings: Settings, run_id: str) -> list[str]:
    """Return the tasks of a pipeline run whose last try has not ended well; none where MLflow does not say."""
    configure_environment()
    try:
        client = connect(settings)
        last = {str(run.info.run_name): run for run in _tasks(client, _place(client, settings), run_id).values()}
    except Exception as e:  # whatever MLflow, the network or a proxy raises
        logger.warning("MLflow does not know what failed: %s", one_line(e))
        return []
    return [name for name, run in last.items() if _PARENT in run.data.tags and run.info.status != "FINISHED"]


def end_runs(settings: Settings, run_id: str, status: Ended, tags: Mapping[str, str]) -> None:
    """End the MLflow runs that killed tasks of a pipeline run left open; tag the parent and sum up what was used."""
    configure_environment()
    try:
        client = connect(settings)
        found = _tasks(client, _place(client, settings), run_id)
        given = parent_from_environment()
        parents = [one for one, run in found.items() if _PARENT not in run.data.tags]
        used = of_lifecycle(usage_of(run.data.metrics) for run in found.values() if REUSED_TAG not in run.data.tags)
        for parent in [given] if given is not None else parents:
            _tag(client, parent, tags)
            for name, value in used.items():
                client.log_metric(parent, name, value)
        for run in found.values():
            # Who gave us a run ends it.
            if run.info.status == "RUNNING" and run.info.run_id != given:
                client.set_terminated(run.info.run_id, status)
    except Exception as e:  # whatever MLflow, the network or a proxy raises
        logger.warning("MLflow does not know how this run ended: %s", one_line(e))


def _place(client: MlflowClient, settings: Settings) -> str:
    """Return the experiment of a run's tasks: that of the run that somebody opened for us, else ours."""
    given = parent_from_environment()
    return _experiment(client, settings) if given is None else str(client.get_run(given).info.experiment_id)


def _tasks(client: MlflowClient, experiment: str, run_id: str) -> dict[str, Run]:
    """Return the MLflow runs of a pipeline run by their ids, its own among them."""
    found = {str(run.info.run_id): run for run in _runs(client, experiment, f"tags.`{RUN_TAG}` = '{run_id}'")}
    given = parent_from_environment()
    parents = [one for one, run in found.items() if _PARENT not in run.data.tags]
    for parent in [given] if given is not None else parents:
        # A verb that tracks itself knows its parent alone.
        children = _runs(client, experiment, f"tags.`{_PARENT}` = '{parent}'")
        found |= {str(run.info.run_id): run for run in children}
    return found


def _tag(client: MlflowClient, run: str, tags: Mapping[str, str]) -> None:
    for name, value in tags.items():
        client.set_tag(run, name, value)


def _experiment(client: MlflowClient, settings: Settings) -> str:
    found = client.get_experiment_by_name(settings.experiment)
    if found is not None:
        return str(found.experiment_id)
    return str(client.create_experiment(settings.experiment, artifact_location=artifact_location(settings)))


def _runs(client: MlflowClient, experiment: str, which: str) -> list[Run]:
    return list(client.search_runs([experiment], which, order_by=["start_time ASC"]))
