"""The last task of a graph: how the run ended, in its folder and in MLflow."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from nvila_pipelines.steps.component import run_task
from nvila_platform.artifacts import utc_now, write_atomically
from nvila_platform.settings import Settings, runner_pid

if TYPE_CHECKING:
    from nvila_platform.pipeline_runs import Ended

logger = logging.getLogger(__name__)

OUTCOME_FILE = "outcome.json"
_SUCCEEDED, _FAILED, _CANCELLED = "SUCCEEDED", "FAILED", "CANCELLED"
# Kubeflow's versions say it in the words of their API or of ML Metadata.
_STATES = {
    "SUCCEEDED": _SUCCEEDED,
    "COMPLETE": _SUCCEEDED,
    "CACHED": _SUCCEEDED,
    "CANCELLED": _CANCELLED,
    "CANCELED": _CANCELLED,
    "CANCELLING": _CANCELLED,
    "CANCELING": _CANCELLED,
}
_ENDED: dict[str, Ended] = {_SUCCEEDED: "FINISHED", _FAILED: "FAILED", _CANCELLED: "KILLED"}
_LONGEST = 500


def finish_run(run_id: str, state: str, message: str, *, followed: bool = True) -> None:
    """Record the outcome of a run, delete a job that a killed task left, and end the runs of such tasks in MLflow.

    Args:
        run_id: Name of the run.
        state: How it ended, in Kubeflow's words; what is neither success nor cancellation is recorded as FAILED.
        message: What failed; empty where nothing did, or where Kubeflow does not say it.
        followed: Whether a run on this machine has somebody who tells MLflow what its steps do.
    """
    run_task("finish", run_id, lambda settings: _finish(settings, run_id, state, message, followed))


def _finish(settings: Settings, run_id: str, state: str, message: str, followed: bool) -> None:
    folder = settings.workspace / "runs" / run_id
    folder.mkdir(parents=True, exist_ok=True)
    state = _STATES.get(state.upper(), _FAILED)
    if state != _SUCCEEDED:
        from nvila_platform.launch.job_notes import end_jobs

        for line in end_jobs(settings.workspace, run_id):
            logger.warning("%s", line)
    nobody_tells = runner_pid() is None or not followed
    if state == _FAILED and not message and nobody_tells:
        from nvila_platform.pipeline_runs import unfinished_tasks

        names = unfinished_tasks(settings, run_id)
        message = f"did not finish: {', '.join(names)}" if names else ""
    outcome = {"run_id": run_id, "state": state, "message": message, "at": utc_now()}
    write_atomically(folder / OUTCOME_FILE, json.dumps(outcome, indent=2) + "\n")
    if nobody_tells:
        from nvila_platform.pipeline_runs import end_runs

        tags = {"nvila.outcome": state, "nvila.failure": message[:_LONGEST]}
        end_runs(settings, run_id, _ENDED[state], tags)
