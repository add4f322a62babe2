"""Which run follows which job of the cluster, so that the end of a run can take away what a killed step left.

A note is a small file in the workspace, which a step with a job shares with its nodes anyhow. It goes when the job is
complete. A later run that follows the same job takes the note over, and an earlier one then leaves the job alone.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nvila.errors import NvilaError
from nvila_platform.artifacts import write_atomically

_FOLDER = "jobs"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobNote:
    """A job and who follows it.

    Args:
        name: Of the job.
        namespace: None for that of the pod or kubeconfig.
        run_id: Of the run.
    """

    name: str
    namespace: str | None
    run_id: str


def note_job(workspace: Path, note: JobNote) -> None:
    """Write down who follows a job."""
    folder = workspace / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{note.name}.json", json.dumps(asdict(note)) + "\n")


def forget_job(workspace: Path, name: str) -> None:
    """Take the note of a job away."""
    (workspace / _FOLDER / f"{name}.json").unlink(missing_ok=True)


def end_jobs(workspace: Path, run_id: str) -> list[str]:
    """Delete the jobs that a run has left running; return a line for each, also for what could not be deleted.

    One that has failed stays, so that one can look at it, until the next try takes it away.
    """
    from nvila_platform.cluster.client import ClusterClient
    from nvila_platform.cluster.errors import NotThereError
    from nvila_platform.cluster.trainjob import API_VERSION
    from nvila_platform.launch.job_progress import conditions

    said: list[str] = []
    for note in _notes(workspace, run_id):
        metadata = {"name": note.name} | ({} if note.namespace is None else {"namespace": note.namespace})
        address = {"apiVersion": API_VERSION, "kind": "TrainJob", "metadata": metadata}
        try:
            client = ClusterClient()
            job = client.find(address)
            if job is not None and not {"Failed", "Complete"} & set(conditions(job)):
                with contextlib.suppress(NotThereError):
                    client.delete(job)
                said.append(f"job {note.name} was left and is deleted: its nodes save a checkpoint and end")
        except NvilaError as e:
            said.append(f"job {note.name} was left: {e}; to end it: kubectl delete trainjob {note.name}")
        else:
            forget_job(workspace, note.name)
    return said


def _notes(workspace: Path, run_id: str) -> list[JobNote]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((workspace / _FOLDER).glob("*.json"))]
    return [JobNote(**one) for one in found if one["run_id"] == run_id]
