"""Training jobs over real HTTP: what a job waits for, how it ends, and what of it reaches the step."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.fake_kubernetes import Call, stamp
from tests.fake_trainer import GROUP, JOBS
from tests.train_job_step import PATIENCE, Step, ended, pod

from nvila.errors import (
    CapabilityError,
    ConfigError,
    InfrastructureError,
    NvilaError,
)
from nvila_platform.cluster.errors import TakenError
from nvila_platform.launch.job_progress import Patience
from nvila_platform.launch.stopping import Terminated
from nvila_platform.settings import ERROR_FILE

if TYPE_CHECKING:
    from tests.charts.crd_validation import CrdSchemas


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
    env = {
        "NVILA_WORKSPACE": "/data/ws",
        "NVILA_S3_SECRET_KEY": "hunter2",
        "NVILA_S3_ENDPOINT": "",
        # The task has it of the same config map.
        "NVILA_TRACKING_URI": "http://mlflow:5000",
    }
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
    assert len(variables) == len(trainer["env"])
    assert "hunter2" not in json.dumps(job)
    assert variables.pop(ERROR_FILE).startswith(str(step.log.parent))
    assert variables == {
        "MLFLOW_RUN_ID": "run7",
        "NCCL_DEBUG": "INFO",
        "NVILA_METRICS_ADDRESS": "0.0.0.0:9464",
        "NVILA_S3_SECRET_KEY": {"secretKeyRef": {"name": "s3", "key": "secret-key"}},
        "NVILA_TRACKING_URI": {"configMapKeyRef": {"name": "settings", "key": "uri"}},
        "NVILA_WORKSPACE": "/data/ws",
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
    patch = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    template = patch["template"]["spec"]["template"]
    assert template["metadata"] == {"labels": {"nvila.dev/metrics": "training"}}
    nodes = template["spec"]
    assert nodes["nodeSelector"] == {"pool": "h100"}
    assert nodes["tolerations"] == [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}]
    assert (nodes["serviceAccountName"], nodes["terminationGracePeriodSeconds"]) == ("trainer", 120)
    assert nodes["volumes"][1] == {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": "32768Mi"}}
    assert [one["mountPath"] for one in nodes["containers"][0]["volumeMounts"]][1] == "/dev/shm"  # noqa: S108


@pytest.mark.parametrize(
    ("env", "own", "said"),
    [
        ({}, {}, "0.0.0.0:9464"),
        ({"NVILA_METRICS_ADDRESS": ""}, {}, "0.0.0.0:9464"),
        ({"NVILA_METRICS_ADDRESS": "0.0.0.0:9100"}, {}, "0.0.0.0:9100"),
        ({"NVILA_METRICS_ADDRESS": "0.0.0.0:9100"}, {"env": {"NVILA_METRICS_ADDRESS": "0"}}, "0"),
        (
            {"NVILA_METRICS_ADDRESS": "0.0.0.0:9100"},
            {"config_maps": {"settings": {"address": "NVILA_METRICS_ADDRESS"}}},
            {"configMapKeyRef": {"name": "settings", "key": "address"}},
        ),
    ],
    ids=["default", "unset", "settings", "off-in-the-profile", "config-map"],
)
def test_nodes_offer_metrics_where_prometheus_asks_unless_told_otherwise(
    step: Step, env: dict[str, str], own: dict[str, Any], said: Any
) -> None:
    step.values |= own
    seen: list[dict[str, Any]] = []
    made = step.cluster.on_create

    def create(job: dict[str, Any]) -> None:
        seen.append(job)
        made(job)
        step.trainer.complete()

    step.cluster.on_create = create
    step.launch(env)
    (job,) = seen
    found = [
        one.get("value", one.get("valueFrom"))
        for one in job["spec"]["trainer"]["env"]
        if one["name"] == "NVILA_METRICS_ADDRESS"
    ]
    assert found == [said]


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


# A signal between making a socket and connecting it leaves it to the collector: its handler raises no OSError, and that
# is the only thing for which `socket.create_connection` closes.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
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
