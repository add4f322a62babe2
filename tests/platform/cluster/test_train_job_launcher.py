"""Training jobs over real HTTP: what a job waits for, how it ends, and what of it reaches the step."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.fake_kubernetes import Call, Cluster, stamp
from tests.fake_trainer import GROUP, JOBS, FakeTrainer

from nvila.errors import (
    CapabilityError,
    ConfigError,
    DataError,
    InfrastructureError,
    NvilaError,
    ResourceError,
)
from nvila_platform.cluster.errors import TakenError
from nvila_platform.cluster.placement import JobPlacement
from nvila_platform.launch import Launcher
from nvila_platform.launch.job_progress import Patience
from nvila_platform.launch.outcome import KILLED, RAISED
from nvila_platform.launch.stopping import Terminated
from nvila_platform.launch.train_job import TrainJobLauncher
from nvila_platform.settings import ERROR_FILE

if TYPE_CHECKING:
    from tests.charts.crd_validation import CrdSchemas

# Quick, so that nothing here is timed: what is waited for comes from the test itself.
PATIENCE = Patience(look_s=1, start_s=0.5, api_s=60, stop_s=10, gone_s=10, drain_s=20)
Story = Callable[["Step"], None]


class Step:
    """A step that runs a job in a thread while the test plays the cluster."""

    def __init__(self, cluster: Cluster, folder: Path, *, run: bool = False) -> None:
        self.cluster = cluster
        self.trainer = FakeTrainer(cluster, run=run)
        self.said: list[str] = []
        self.echo = io.StringIO()
        self.log = folder / "logs" / "run-train.log"
        self.patience = PATIENCE
        self.values: dict[str, Any] = {"image": "nvila:1", "nodes": 2, "claims": {"work": str(folder.resolve())}}

    def launcher(self) -> TrainJobLauncher:
        placement = JobPlacement.model_validate(self.values)
        return TrainJobLauncher(placement, "key-1", self.said.append, echo=self.echo, patience=self.patience)

    def launch(self, env: dict[str, str] | None = None) -> None:
        launcher: Launcher = self.launcher()
        launcher.run("some.module", ["spec.json"], num_processes=1, env=env or {}, log_path=self.log)

    def play(self, story: Callable[[], None]) -> None:
        """Launch, and let the story happen to the job once it is there."""
        failed: list[BaseException] = []
        attempts, said = self.trainer.attempts, len(self.said)

        def found() -> bool:
            return self.trainer.attempts > attempts or any("going on with it" in one for one in self.said[said:])

        def tell() -> None:
            try:
                self.until(found)
                story()
            except BaseException as e:  # told to the test below
                failed.append(e)
                self.trainer.set_status(("Complete", "True", "the story failed"))

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            self.launch()
        finally:
            thread.join(30)
            if failed:
                raise failed[0]

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, f"waited in vain; said: {self.said}"
            time.sleep(0.02)

    def job(self) -> dict[str, Any]:
        (job,) = self.cluster.all(GROUP, JOBS)
        return job

    def lines(self) -> list[str]:
        """Return the log without times and names of attempts."""
        text = self.log.read_text(encoding="utf-8") if self.log.is_file() else ""
        return [line.partition(" ")[2] for line in text.splitlines()]


@pytest.fixture
def step(kubernetes_cluster: Cluster, tmp_path: Path) -> Iterator[Step]:
    made = Step(kubernetes_cluster, tmp_path)
    yield made
    made.trainer.close()


def pod(step: Step, index: int, attempt: int = 1) -> str:
    return f"{step.launcher().job_name}-node-0-{index}-try{attempt}"


def test_a_job_runs_to_its_end_and_its_lines_come_here_once(step: Step) -> None:
    def story() -> None:
        step.trainer.start()
        step.cluster.log(pod(step, 0), "step 1", "step 2")
        step.cluster.log(pod(step, 1), "ready")
        step.until(lambda: len(step.lines()) == 3)
        step.cluster.log(pod(step, 0), "step 3")
        step.trainer.complete()

    step.play(story)
    assert sorted(step.lines()) == [
        f"[{pod(step, 0)}] step 1",
        f"[{pod(step, 0)}] step 2",
        f"[{pod(step, 0)}] step 3",
        f"[{pod(step, 1)}] ready",
    ]
    assert sorted(step.echo.getvalue().splitlines()) == sorted(step.lines())
    assert step.said[0] == f"job {step.launcher().job_name} is created: 2 nodes"
    assert "2 nodes have started: node 0 (on machine-0), node 1 (on machine-1)" in step.said
    assert step.cluster.all(GROUP, JOBS) == []


def test_the_manifest_says_what_the_profile_says(step: Step, crds: CrdSchemas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "run7")
    step.cluster.validate = lambda job: crds.errors(job | {"metadata": {"name": job["metadata"]["name"]}})
    step.values |= {
        "nodes": 4,
        "gpus": 8,
        "cpu": "32",
        "memory": "256Gi",
        "queue": "research",
        "node_selector": {"pool": "h100"},
        "tolerations": [{"key": "spot", "effect": "NoSchedule"}],
        "secrets": {"s3": {"secret-key": "NVILA_S3_SECRET_KEY"}},
        "config_maps": {"settings": {"uri": "NVILA_TRACKING_URI"}},
        "env": {"NCCL_DEBUG": "INFO"},
        "shm_gib": 32,
        "service_account": "trainer",
    }
    seen: list[dict[str, Any]] = []
    made = step.cluster.on_create

    def create(job: dict[str, Any]) -> None:
        seen.append(job)
        made(job)
        step.trainer.complete()

    step.cluster.on_create = create
    env = {"NVILA_WORKSPACE": "/data/ws", "NVILA_S3_SECRET_KEY": "hunter2", "NVILA_S3_ENDPOINT": ""}
    step.launch(env)
    (job,) = seen
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    trainer = job["spec"]["trainer"]
    assert [*trainer["command"], *trainer["args"]] == [
        *("python", "-m", "nvila_platform.launch.child", "0", "SIGTERM", "torch.distributed.run"),
        *("-m", "nvila_platform.launch.child", "0", "SIGKILL", "some.module", "spec.json"),
    ]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "32", "memory": "256Gi", "nvidia.com/gpu": "8"}
    variables = {one["name"]: one.get("value", one.get("valueFrom")) for one in trainer["env"]}
    assert "hunter2" not in json.dumps(job)
    assert variables.pop(ERROR_FILE).startswith(str(step.log.parent))
    assert variables == {
        "MLFLOW_RUN_ID": "run7",
        "NCCL_DEBUG": "INFO",
        "NVILA_S3_SECRET_KEY": {"secretKeyRef": {"name": "s3", "key": "secret-key"}},
        "NVILA_TRACKING_URI": {"configMapKeyRef": {"name": "settings", "key": "uri"}},
        "NVILA_WORKSPACE": "/data/ws",
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
    patch = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    nodes = patch["template"]["spec"]["template"]["spec"]
    assert nodes["nodeSelector"] == {"pool": "h100"}
    assert nodes["tolerations"] == [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}]
    assert (nodes["serviceAccountName"], nodes["terminationGracePeriodSeconds"]) == ("trainer", 120)
    assert nodes["volumes"][1] == {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": "32768Mi"}}
    assert [one["mountPath"] for one in nodes["containers"][0]["volumeMounts"]][1] == "/dev/shm"  # noqa: S108


def test_nodes_that_cannot_see_the_workspace_are_refused_before_there_is_a_job(step: Step) -> None:
    step.values["claims"] = {"work": "/elsewhere"}
    with pytest.raises(ConfigError, match="lies on no claim, these are mounted at /elsewhere"):
        step.launch()
    assert step.cluster.calls == set()


def test_a_connection_that_breaks_in_the_middle_of_a_line_loses_and_doubles_nothing(step: Step) -> None:
    # Within lines, at their ends, and where lines of one instant are alike.
    for cut in (1, 40, 75, 200, 333):
        step.cluster.break_next("get", "pods/log", after_bytes=cut)

    def story() -> None:
        step.trainer.start()
        for number in range(6):
            step.cluster.log(pod(step, 0), f"line {number}")
        step.cluster.log(pod(step, 0), "same", "same", "same", at=stamp())
        step.cluster.log(pod(step, 0), "é" * 30, "no line break at the end")
        step.until(lambda: len(step.lines()) == 11)
        step.trainer.complete()

    step.play(story)
    assert step.lines() == [
        f"[{pod(step, 0)}] {text}"
        for text in (*(f"line {n}" for n in range(6)), "same", "same", "same", "é" * 30, "no line break at the end")
    ]
    assert all(one.times == 0 for one in step.cluster.troubles)


def test_a_step_that_was_killed_goes_on_with_its_job_and_behind_its_last_line(step: Step) -> None:
    def first() -> None:
        step.trainer.start()
        step.cluster.log(pod(step, 0), "one", "two")
        step.until(lambda: len(step.lines()) == 2)
        # The API server goes away for longer than the step waits, which is one way to leave a job alone.
        for verb, resource in (("get", "trainjobs"), ("watch", "trainjobs"), ("list", "pods")):
            step.cluster.break_next(verb, resource, 10**6, status=503, body='{"message": "down"}')

    step.patience = Patience(look_s=1, api_s=0.5)
    with pytest.raises(InfrastructureError, match="goes on without this step") as failed:
        step.play(first)
    assert "kubectl delete trainjob nvila-train-" in failed.value.hint
    step.cluster.troubles.clear()
    # What a kill in the middle of a write leaves.
    with step.log.open("ab") as log:
        log.write(b"2026-11-26T10:00:00.0Z [po")

    def second() -> None:
        step.cluster.log(pod(step, 0), "three")
        step.until(lambda: len(step.lines()) == 3)
        step.trainer.complete()

    step.patience = PATIENCE
    step.play(second)
    assert step.lines() == [f"[{pod(step, 0)}] {text}" for text in ("one", "two", "three")]
    assert step.trainer.attempts == 1
    assert any("of an earlier try is there; going on with it" in text for text in step.said)


def test_an_api_server_that_is_away_for_a_moment_is_waited_for(step: Step) -> None:
    def story() -> None:
        step.trainer.start()
        step.cluster.break_next("get", "trainjobs", 2, status=500, body="{}")
        step.cluster.break_next("list", "pods", 1)
        step.until(lambda: any("waiting for it, the job goes on" in text for text in step.said))
        step.trainer.complete()

    step.play(story)


def test_a_job_with_other_nodes_takes_the_place_of_the_one_that_runs(step: Step) -> None:
    step.patience = Patience(look_s=1, api_s=0.1)
    step.cluster.break_next("watch", "trainjobs", 10**6, status=503, body="{}")
    with pytest.raises(InfrastructureError):
        step.play(step.trainer.start)
    step.cluster.troubles.clear()
    step.patience, step.values["nodes"] = PATIENCE, 1

    def story() -> None:
        step.until(lambda: step.trainer.attempts == 2)
        step.trainer.complete()

    step.play(story)
    assert any("runs with other nodes or settings; it ends first" in text for text in step.said)


def test_a_job_of_somebody_else_is_left_alone(step: Step) -> None:
    name = step.launcher().job_name
    step.cluster.put(GROUP, JOBS, {"kind": "TrainJob", "metadata": {"name": name}, "spec": {"trainer": {}}})
    with pytest.raises(TakenError, match="not of this program"):
        step.launch()
    assert step.cluster.get(GROUP, JOBS, name) is not None


def ended(**terminated: Any) -> dict[str, Any]:
    return {"terminated": terminated}


def oom(step: Step) -> None:
    step.values["memory"] = "64Gi"
    step.trainer.pod(pod(step, 1), "Failed", ended(exitCode=137, reason="OOMKilled"))


def spot(step: Step) -> None:
    gone = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager", "message": "reclaimed"}
    step.trainer.pod(pod(step, 1), "Failed", ended(exitCode=143, reason="Error"), conditions=[gone])
    step.trainer.pod(pod(step, 0), "Failed", ended(exitCode=1, reason="Error"))


def evicted(step: Step) -> None:
    step.trainer.pod(pod(step, 0), "Failed", None, reason="Evicted", message="disk pressure")


def vanished(step: Step) -> None:
    # The pod goes first; the other one only fails because of it.
    step.cluster.remove("", "pods", pod(step, 1))
    step.until(lambda: step.cluster.calls_of("list", "pods") > 6)
    step.trainer.pod(pod(step, 0), "Failed", ended(exitCode=1, reason="Error"))


def killed(step: Step) -> None:
    step.trainer.pod(pod(step, 0), "Failed", ended(exitCode=137, reason="Error"))


def asked(step: Step) -> None:
    step.trainer.pod(pod(step, 0), "Failed", ended(exitCode=75, reason="Error"))


def crashed(step: Step) -> None:
    step.cluster.log(pod(step, 0), "Traceback of the crash")
    step.trainer.pod(pod(step, 0), "Failed", ended(exitCode=1, reason="Error"))
    # The controllers take the other nodes away, which is no loss of a node.
    step.cluster.remove("", "pods", pod(step, 1))


def nothing(step: Step) -> None:
    """The pods say nothing."""


@pytest.mark.parametrize(
    ("happens", "error", "message", "hint"),
    [
        (oom, ResourceError, r"node 1 \(on machine-1\) ran out of memory of 64Gi", "more memory"),
        (spot, InfrastructureError, "node 1 .* was lost: DeletionByTaintManager: reclaimed", "last checkpoint"),
        (evicted, InfrastructureError, "node 0 .* was lost: Evicted: disk pressure", "last checkpoint"),
        (vanished, InfrastructureError, "node 1 .* is gone with its pod", "last checkpoint"),
        (killed, InfrastructureError, "node 0 .* was killed by SIGKILL", "often: out of memory"),
        (asked, InfrastructureError, "node 0 .* ended with exit code 75", "last checkpoint"),
        (crashed, NvilaError, "node 0 .* ended with exit code 1", "Traceback of the crash"),
        (nothing, NvilaError, "failed: the deadline is over", "kubectl describe trainjob"),
    ],
)
def test_a_job_that_failed_says_why(
    happens: Story, error: type[NvilaError], message: str, hint: str, step: Step
) -> None:
    if happens is oom:
        step.values["memory"] = "64Gi"

    def story() -> None:
        step.trainer.start()
        step.until(lambda: any("2 nodes have started" in text for text in step.said))
        happens(step)
        step.trainer.fail("the deadline is over")

    with pytest.raises(error, match=message) as failed:
        step.play(story)
    assert type(failed.value) is error
    assert hint in failed.value.hint
    # It stays to be looked at, and makes room for the next try.
    assert step.job()["metadata"]["name"] == step.launcher().job_name
    step.play(step.trainer.complete)
    assert step.trainer.attempts == 2


@pytest.mark.parametrize("cause", [RAISED, KILLED])
def test_the_modules_own_error_comes_back(step: Step, cause: str) -> None:
    def story() -> None:
        step.trainer.start()
        (path,) = [one["value"] for one in step.job()["spec"]["trainer"]["env"] if one["name"] == ERROR_FILE]
        left = DataError("train.jsonl:3: broken JSON", "repair it")
        Path(path).write_text(json.dumps(left.to_dict() | {"cause": cause}), encoding="utf-8")
        step.trainer.pod(pod(step, 0), "Failed", ended(exitCode=1, reason="Error"))
        step.trainer.fail()

    with pytest.raises(DataError, match="broken JSON") as failed:
        step.play(story)
    assert ("log: " in failed.value.hint) == (cause == KILLED)
    # The error of that try is not the next one's.
    step.play(step.trainer.complete)


def waiting(reason: str, message: str) -> dict[str, Any]:
    return {"waiting": {"reason": reason, "message": message}}


def no_image(step: Step) -> None:
    step.trainer.pod(pod(step, 1), "Pending", waiting("ImagePullBackOff", "nvila:1: not found"))


def no_secret(step: Step) -> None:
    step.trainer.pod(pod(step, 1), "Pending", waiting("CreateContainerConfigError", 'secret "s3" not found'))


def no_machine(step: Step) -> None:
    said = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/5: no nvidia.com/gpu"}
    step.trainer.pod(pod(step, 1), "Pending", None, conditions=[said])


def no_quota(step: Step) -> None:
    for name in step.trainer.pod_names():
        step.cluster.remove("", "pods", name)
    job = step.launcher().job_name
    step.cluster.put("", "events", {
        "metadata": {"name": "e1"}, "type": "Warning", "reason": "FailedCreate", "message": "exceeded quota: gpus",
        "involvedObject": {"kind": "Job", "name": f"{job}-node-0"},
    })  # fmt: skip


@pytest.mark.parametrize(
    ("keeps", "error", "message"),
    [
        (no_image, ConfigError, "node 1 .* cannot pull the image nvila:1: ImagePullBackOff: nvila:1: not found"),
        (no_secret, ConfigError, 'cannot start its container: CreateContainerConfigError: secret "s3" not found'),
        (no_machine, InfrastructureError, "node 1 .* finds no machine: 0/5: no nvidia.com/gpu"),
        (no_quota, InfrastructureError, "the cluster makes no pods: exceeded quota: gpus"),
    ],
)
def test_a_job_that_cannot_start_says_why_and_lets_its_nodes_go(
    keeps: Story, error: type[NvilaError], message: str, step: Step
) -> None:
    step.values["pending_timeout_s"] = 1
    with pytest.raises(error, match=message):
        step.play(lambda: keeps(step))
    assert step.cluster.all(GROUP, JOBS) == []


def test_an_image_that_comes_late_is_no_failure(step: Step) -> None:
    step.patience = Patience(look_s=1, start_s=30)

    def story() -> None:
        no_image(step)
        step.until(lambda: any("cannot pull the image" in text for text in step.said))
        step.trainer.start()
        step.until(lambda: any("2 nodes have started" in text for text in step.said))
        step.trainer.complete()

    step.play(story)


def workload(step: Step, version: str) -> None:
    step.cluster.groups = {f"{GROUP}/v1alpha1", f"kueue.x-k8s.io/{version}"}
    labels = {"kueue.x-k8s.io/job-uid": step.job()["metadata"]["uid"]}
    status = {"conditions": [{"type": "QuotaReserved", "status": "False", "message": "insufficient quota for gpu"}]}
    step.cluster.put("kueue.x-k8s.io", "workloads", {"metadata": {"name": "w", "labels": labels}, "status": status})


@pytest.mark.parametrize("version", ["v1beta2", "v1beta1"])
def test_a_job_in_a_queue_waits_as_long_as_it_takes_and_says_for_what(step: Step, version: str) -> None:
    step.values |= {"queue": "research", "pending_timeout_s": 1}

    def story() -> None:
        workload(step, version)
        step.trainer.set_status(("Suspended", "True", "waits"))
        step.until(lambda: any("waits in queue research: insufficient quota for gpu" in text for text in step.said))
        time.sleep(1.5)
        step.trainer.set_status(("Suspended", "False", "resumed"))
        step.trainer.start()
        step.until(lambda: any("2 nodes have started" in text for text in step.said))
        step.trainer.complete()

    step.play(story)


def test_a_job_that_somebody_deletes_is_no_reason_to_try_again(step: Step) -> None:
    def story() -> None:
        step.trainer.start()
        step.until(lambda: any("2 nodes have started" in text for text in step.said))
        step.cluster.remove(GROUP, JOBS, step.launcher().job_name)

    with pytest.raises(NvilaError, match="was deleted while it ran") as failed:
        step.play(story)
    assert not failed.value.retryable


def test_what_may_not_be_seen_is_named_once_and_the_job_goes_on(step: Step) -> None:
    step.cluster.forbidden = {Call("list", "", "pods"), Call("list", "", "events"), Call("get", "", "pods/log")}

    def story() -> None:
        step.trainer.start()
        step.until(lambda: any("may not touch events" in text for text in step.said))
        step.cluster.forbidden.discard(Call("list", "", "pods"))
        step.until(lambda: any("no logs of the nodes here" in text for text in step.said))
        step.trainer.complete()

    step.play(story)
    assert sum("may not touch pods" in text for text in step.said) == 1


def test_a_user_who_may_not_make_jobs_is_told_so(step: Step) -> None:
    step.cluster.forbidden = {Call("create", GROUP, JOBS)}
    with pytest.raises(CapabilityError, match='cannot create resource "trainjobs"'):
        step.launch()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_deletes_the_job_and_its_last_lines_still_come(step: Step, number: signal.Signals) -> None:
    def delete(job: dict[str, Any]) -> bool:
        def end() -> None:
            step.cluster.log(pod(step, 0), "saved a checkpoint", closed=True)
            step.trainer.pod(pod(step, 0), "Succeeded", ended(exitCode=0))
            step.until(lambda: any("saved a checkpoint" in line for line in step.lines()))
            step.cluster.remove(GROUP, JOBS, job["metadata"]["name"])

        threading.Thread(target=end, daemon=True).start()
        return False

    def story() -> None:
        step.cluster.on_delete = delete
        step.trainer.start()
        step.until(lambda: any("2 nodes have started" in text for text in step.said))
        os.kill(os.getpid(), number)

    with pytest.raises(Terminated if number == signal.SIGTERM else KeyboardInterrupt):
        step.play(story)
    assert step.cluster.all(GROUP, JOBS) == []
    assert step.lines()[-1].endswith("saved a checkpoint")


def test_a_job_that_cannot_be_deleted_is_named(step: Step) -> None:
    step.cluster.forbidden = {Call("delete", GROUP, JOBS)}

    def story() -> None:
        step.trainer.start()
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated):
        step.play(story)
    assert f"to end it: kubectl delete trainjob {step.launcher().job_name}" in step.said[-1]
