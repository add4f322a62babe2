"""Processes on the nodes of a cluster: a Kubeflow TrainJob, followed to its end as if it ran here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from nvila.errors import ConfigError, InfrastructureError, NvilaError
from nvila_platform.artifacts import storage_errors
from nvila_platform.cluster.client import ClusterClient
from nvila_platform.cluster.errors import NotThereError, TakenError
from nvila_platform.cluster.logs import PodLogs, Say
from nvila_platform.cluster.placement import METRICS_ADDRESS, WATCHED, JobPlacement
from nvila_platform.cluster.pods import selector
from nvila_platform.cluster.trainjob import NODE, TrainJobSpec, train_job
from nvila_platform.launch.job_notes import JobNote, forget_job, note_job
from nvila_platform.launch.job_progress import JobProgress, Patience, conditions
from nvila_platform.launch.job_results import job_failure
from nvila_platform.launch.stopping import terminable
from nvila_platform.settings import ERROR_FILE, SECRET_VARIABLES

_CHILD = "nvila_platform.launch.child"
# The agent gets SIGTERM from Kubernetes and passes it on; its workers die with it.
_AGENT = (_CHILD, "0", "SIGTERM", "torch.distributed.run", "-m", _CHILD, "0", "SIGKILL")
_MADE_OF = "nvila.dev/made-of"
# Of the run and not of the work: a job that another run has started is the same job.
_OF_THE_RUN = (ERROR_FILE, "MLFLOW_RUN_ID")
# A step of training and its checkpoint, on nodes that end one after the other.
_GRACE_S = 120
_GONE_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """Files that this process shares with the nodes."""

    log: Path
    error: Path


class TrainJobLauncher:
    """Runs a module as a TrainJob and streams its logs; a job of the same work that runs already is followed instead.

    SIGTERM and Ctrl-C delete the job, whose nodes save a checkpoint. An API server that is away leaves the job alone.

    Args:
        placement: The nodes.
        work: What the job is, such as the key of a step: two jobs of one work never run at once.
        say: Told what the job waits for.
        echo: Gets the log lines of the nodes, too.
        patience: How long to wait for what.
        noted: Workspace and run, for a note of who follows the job while it is not complete; None writes none.
    """

    def __init__(
        self,
        placement: JobPlacement,
        work: str,
        say: Say,
        *,
        echo: TextIO | None = None,
        patience: Patience | None = None,
        noted: tuple[Path, str] | None = None,
    ) -> None:
        self._placement = placement
        self._noted = noted
        self.job_name = f"nvila-train-{hashlib.sha256(work.encode()).hexdigest()[:12]}"
        self._say = say
        self._echo = echo
        self._patience = patience or Patience()

    def run(
        self, module: str, args: Sequence[str], *, num_processes: int, env: Mapping[str, str], log_path: Path
    ) -> None:
        """Run a module to its end; see `Launcher.run`.

        Args:
            module: Dotted name of a module with a `__main__` part.
            args: Its command-line arguments; files in them are on a claim.
            num_processes: Of each node, unless nodes have GPUs: then one for each of these.
            env: Variables of the nodes; secrets in it stay here.
            log_path: Gets the log lines of all nodes, with their times.

        Raises:
            NvilaError: The module failed, or the job cannot start; the message says why.
            InfrastructureError: A node was lost, or the cluster is away: the same call goes on from the checkpoint.
        """
        files = _Files(log=log_path, error=log_path.with_name(f".{self.job_name}.error.json"))
        self._check_shared(log_path)
        manifest = self._manifest(module, args, num_processes, env, files)
        with storage_errors(log_path):
            log_path.parent.mkdir(parents=True, exist_ok=True)
        client = ClusterClient()
        if self._noted is not None:
            # Before there is a job: this process may be killed at any time.
            workspace, run_id = self._noted
            note_job(workspace, JobNote(name=self.job_name, namespace=self._placement.namespace, run_id=run_id))
        with terminable():
            try:
                job = self._found(client, manifest) or self._submitted(client, manifest, files)
            except KeyboardInterrupt:
                self._cancel(client, manifest)
                raise
            self._follow(client, job, files)
        if self._noted is not None:
            forget_job(self._noted[0], self.job_name)

    def _check_shared(self, path: Path) -> None:
        mounts = [Path(mount) for mount in self._placement.claims.values()]
        if not any(path.resolve().is_relative_to(mount) for mount in mounts):
            where = ", ".join(map(str, mounts)) or "nowhere"
            raise ConfigError(
                f"the nodes of a job do not see the workspace: {path} lies on no claim, these are mounted at {where}",
                "add claims: {NAME: /path} to the profile of train, and set NVILA_WORKSPACE to a folder below /path",
            )

    def _manifest(
        self, module: str, args: Sequence[str], processes: int, env: Mapping[str, str], files: _Files
    ) -> dict[str, Any]:
        placement = self._placement
        given = {ERROR_FILE: str(files.error), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
        secrets, config_maps = _by_variable(placement.secrets), _by_variable(placement.config_maps)
        # A node reads them where the profile says; the API server refuses a variable that is there twice.
        left_out = {*SECRET_VARIABLES, *secrets, *config_maps}
        plain = {"NVILA_METRICS_ADDRESS": METRICS_ADDRESS} | {name: value for name, value in env.items() if value}
        plain = {name: value for name, value in plain.items() if name not in left_out}
        if run := os.environ.get("MLFLOW_RUN_ID"):
            plain["MLFLOW_RUN_ID"] = run
        spec = TrainJobSpec(
            name=self.job_name,
            image=placement.image,
            launcher=("python", "-m"),
            command=[*_AGENT, module, *args],
            num_nodes=placement.nodes,
            processes_per_node=placement.gpus or processes,
            gpus=placement.gpus,
            gpu_type=placement.gpu_type,
            cpu=placement.cpu,
            memory=placement.memory,
            env=plain | dict(placement.env) | given,
            secrets=secrets,
            config_maps=config_maps,
            claims=placement.claims,
            namespace=placement.namespace,
            runtime=placement.runtime,
            node_selector=placement.node_selector,
            tolerations=[one.model_dump(exclude_none=True) for one in placement.tolerations],
            shm_gib=placement.shm_gib,
            queue=placement.queue,
            service_account=placement.service_account,
            grace_s=_GRACE_S,
            pod_labels=WATCHED,
        )
        manifest = train_job(spec)
        manifest["metadata"]["annotations"] = {_MADE_OF: _digest(manifest)}
        return manifest

    def _found(self, client: ClusterClient, manifest: dict[str, Any]) -> dict[str, Any] | None:
        """Return a job of this work that runs or is complete; one that cannot go on is taken away."""
        job = client.find(manifest)
        if job is None:
            return None
        made_of = job["metadata"].get("annotations", {}).get(_MADE_OF)
        if made_of is None:
            raise TakenError(f"job '{self.job_name}' is there already and not of this program", "delete or rename it")
        state = conditions(job)
        same = made_of == manifest["metadata"]["annotations"][_MADE_OF]
        if same and "Failed" not in state and "deletionTimestamp" not in job["metadata"]:
            self._say(f"job {self.job_name} of an earlier try is there; going on with it")
            return job
        if "Failed" not in state and "Complete" not in state:
            self._say(f"job {self.job_name} runs with other nodes or settings; it ends first")
        self._remove(client, manifest, _GRACE_S + self._patience.gone_s)
        return None

    def _submitted(self, client: ClusterClient, manifest: dict[str, Any], files: _Files) -> dict[str, Any]:
        files.error.unlink(missing_ok=True)
        job = client.create(manifest)
        placement = self._placement
        gpus = f" with {placement.gpus} GPUs each" if placement.gpus else ""
        self._say(f"job {self.job_name} is created: {placement.nodes} nodes{gpus}")
        return job

    def _follow(self, client: ClusterClient, job: dict[str, Any], files: _Files) -> None:
        error_file = _error_file(job) or files.error
        start = files.log.stat().st_size if files.log.is_file() else 0
        with PodLogs(lambda pod, since: client.log(job, pod, NODE, since), files.log, self._say, self._echo) as logs:
            progress = JobProgress(client, job, self._placement, logs, self._say, self._patience)
            try:
                cause = progress.wait()
            except KeyboardInterrupt:
                self._cancel(client, job, logs)
                raise
            except InfrastructureError as e:
                raise InfrastructureError(
                    f"{e.message}; job {self.job_name} goes on without this step",
                    f"run the same command again, which finds it; to end it: kubectl delete trainjob {self.job_name}",
                ) from e
            logs.drain(self._patience.drain_s)
        if cause is None:
            # Its logs are here. What failed stays, so that one can look at it, until the next try.
            with contextlib.suppress(NvilaError):
                client.delete(job)
            return
        if not cause.over:
            with contextlib.suppress(NvilaError):
                client.delete(job)
        raise job_failure(cause, self.job_name, error_file, files.log, start)

    def _cancel(self, client: ClusterClient, job: Mapping[str, Any], logs: PodLogs | None = None) -> None:
        """Delete the job and give its nodes time to save; what they say comes here as long as this process may live."""
        self._say(f"job {self.job_name} is deleted: its nodes save a checkpoint and end")
        try:
            self._remove(client, job, self._patience.stop_s, logs)
        except NvilaError as e:
            self._say(f"{e.message}; to end it: kubectl delete trainjob {self.job_name}")

    def _remove(
        self, client: ClusterClient, job: Mapping[str, Any], timeout_s: float, logs: PodLogs | None = None
    ) -> None:
        with contextlib.suppress(NotThereError):
            client.delete(job)
        end = time.monotonic() + timeout_s
        while client.find(job) is not None:
            if time.monotonic() > end:
                raise InfrastructureError(f"job {self.job_name} has not ended {timeout_s:g} s after its deletion")
            if logs is not None:
                logs.look(client.pods(job, selector(self.job_name)))
            time.sleep(_GONE_POLL_S)


def _by_variable(holders: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[str, str]]:
    return {variable: (holder, key) for holder, keys in holders.items() for key, variable in keys.items()}


def _digest(manifest: Mapping[str, Any]) -> str:
    spec = json.loads(json.dumps(manifest["spec"]))
    spec["trainer"]["env"] = [one for one in spec["trainer"]["env"] if one["name"] not in _OF_THE_RUN]
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def _error_file(job: Mapping[str, Any]) -> Path | None:
    """Return where the nodes of a job leave their error; another run may have started it."""
    for one in job["spec"]["trainer"].get("env", []):
        if one["name"] == ERROR_FILE:
            return Path(one["value"])
    return None
