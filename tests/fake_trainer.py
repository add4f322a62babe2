"""What Kubeflow Trainer, JobSet and the kubelet do with a TrainJob, on this machine: real processes, one for a node."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

from tests.fake_kubernetes import Cluster, Document

GROUP = "trainer.kubeflow.org"
JOBS = "trainjobs"


class FakeTrainer:
    """Makes the pods of jobs and, when asked to, runs their command as the runtime `torch-distributed` does.

    Args:
        cluster: Where jobs come from.
        run: Whether pods run the job's command. Otherwise a test says what happens to them.
    """

    def __init__(self, cluster: Cluster, *, run: bool = False) -> None:
        self.cluster = cluster
        self.attempts = 0
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self._run = run
        self._threads: list[threading.Thread] = []
        cluster.on_create = self._created
        cluster.on_delete = self._deleted

    def pod_names(self) -> list[str]:
        """Return the pods of the newest attempt."""
        return sorted(one["metadata"]["name"] for one in self.cluster.all("", "pods"))

    def set_status(self, *conditions: tuple[str, str, str]) -> None:
        """Give the job conditions: type, status, message."""
        for job in self.cluster.all(GROUP, JOBS):
            listed = [
                {"type": kind, "status": status, "message": message, "reason": kind, "lastTransitionTime": "now"}
                for kind, status, message in conditions
            ]
            self.cluster.put(GROUP, JOBS, job | {"status": {"conditions": listed}})

    def complete(self) -> None:
        """End the job well."""
        for name in self.pod_names():
            self.pod(name, "Succeeded", {"terminated": {"exitCode": 0, "reason": "Completed"}})
            self.cluster.log(name, closed=True)
        self.set_status(("Complete", "True", "all jobs are complete"))

    def fail(self, message: str = "jobset failed due to one or more job failures") -> None:
        """End the job badly."""
        for name in self.pod_names():
            self.cluster.log(name, closed=True)
        self.set_status(("Failed", "True", message))

    def pod(self, name: str, phase: str, state: Document | None = None, **status: Any) -> None:
        """Write the status of a pod."""
        found = self.cluster.get("", "pods", name)
        assert found is not None
        containers = [] if state is None else [{"name": "node", "image": "nvila:1", "state": state}]
        self.cluster.put("", "pods", found | {"status": {"phase": phase, "containerStatuses": containers} | status})

    def start(self) -> None:
        """Let all pods run."""
        for name in self.pod_names():
            self.cluster.log(name)
            self.pod(name, "Running", {"running": {"startedAt": "now"}})

    def lose(self, name: str) -> None:
        """Take a machine away: its processes are gone, the pod says so, and the other pods see their peers go."""
        self.processes[name].kill()
        self.pod(name, "Failed", None, conditions=[
            {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager", "message": "gone"}
        ])  # fmt: skip

    def close(self) -> None:
        """End everything."""
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for thread in self._threads:
            thread.join(20)

    def _created(self, job: Document) -> None:
        if job["kind"] != "TrainJob":
            return
        self.attempts += 1
        for name in self.pod_names():
            self.cluster.remove("", "pods", name)
        port = _free_port()
        for index in range(job["spec"]["trainer"]["numNodes"]):
            name = f"{job['metadata']['name']}-node-0-{index}-try{self.attempts}"
            labels = {
                "jobset.sigs.k8s.io/jobset-name": job["metadata"]["name"],
                "batch.kubernetes.io/job-completion-index": str(index),
            }
            self.cluster.put("", "pods", {
                "metadata": {"name": name, "labels": labels},
                "spec": {"nodeName": f"machine-{index}"},
                "status": {"phase": "Pending"},
            })  # fmt: skip
            if self._run:
                self._start_process(job, name, index, port)

    def _start_process(self, job: Document, name: str, index: int, port: int) -> None:
        trainer = job["spec"]["trainer"]
        given = {one["name"]: one["value"] for one in trainer["env"] if "value" in one}
        runtime = {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(index),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "PYTHONPATH", "LANG") if key in os.environ}
        command = [sys.executable if word == "python" else word for word in (*trainer["command"], *trainer["args"])]
        process = subprocess.Popen(
            command, env=kept | given | runtime, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self.processes[name] = process
        self.cluster.log(name)
        self.pod(name, "Running", {"running": {"startedAt": "now"}})
        thread = threading.Thread(target=self._follow, args=(job["metadata"]["name"], name, process), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _follow(self, job: str, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self.cluster.log(name, line.rstrip("\n"))
        code = process.wait()
        self.cluster.log(name, closed=True)
        with self.cluster.changed:
            found = self.cluster.get("", "pods", name)
            if found is None:
                return
            if found["status"]["phase"] == "Running":
                state = {"terminated": {"exitCode": code if code >= 0 else 128 - code, "reason": "Error"}}
                self.pod(name, "Succeeded" if code == 0 else "Failed", state)
            self._settle(job, code)

    def _settle(self, job: str, code: int) -> None:
        """Judge the job as its controllers do, now that a pod has ended."""
        found = self.cluster.get(GROUP, JOBS, job)
        alive = [process for process in self.processes.values() if process.poll() is None]
        if found is None:
            return
        if "deletionTimestamp" in found["metadata"]:
            if not alive:
                self.cluster.remove(GROUP, JOBS, job)
        elif code:
            self.set_status(("Failed", "True", "jobset failed due to one or more job failures"))
            for process in alive:
                process.send_signal(signal.SIGTERM)
        elif not alive:
            self.set_status(("Complete", "True", "all jobs are complete"))

    def _deleted(self, job: Document) -> bool:
        alive = [process for process in self.processes.values() if process.poll() is None]
        for process in alive:
            process.send_signal(signal.SIGTERM)
        if not self._run:
            for name in self.pod_names():
                self.cluster.log(name, closed=True)
                self.cluster.remove("", "pods", name)
        return not alive


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
