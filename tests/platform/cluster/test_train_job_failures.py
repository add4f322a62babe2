"""Training jobs over real HTTP: why one failed or cannot start, and whether it is worth another try."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.fake_trainer import GROUP, JOBS
from tests.train_job_step import Step, ended, pod

from nvila.errors import (
    ConfigError,
    DataError,
    InfrastructureError,
    NvilaError,
    ResourceError,
)
from nvila_platform.launch.job_progress import Patience
from nvila_platform.launch.outcome import KILLED, RAISED
from nvila_platform.settings import ERROR_FILE

Story = Callable[[Step], None]


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
