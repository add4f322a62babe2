"""Deployments that something comes between: a kill, a cut connection, an expired token, another one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.pipelines.deployment.conftest import World

Nvila = Callable[..., Any]
COMMAND = ["deploy", "eye/2", "--policy", "policy.yaml", "--steps", "10", "--timeout", "5"]


def started(world: World, tmp_path: Path, *more: str) -> subprocess.Popen[str]:
    """Start a deployment as a process of its own that watches its first step for a long time."""
    program = "import sys; from nvila_pipelines.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *COMMAND, "--interval", "60", *more]
    return subprocess.Popen(command, cwd=tmp_path, env=dict(os.environ), stderr=subprocess.PIPE, text=True)


def until(found: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)


def watching(world: World) -> bool:
    state = world.state()
    return bool(state["phase"] == "stepping" and state["since"] > 0)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["SIGKILL", "SIGTERM"]
)
def test_a_deployment_that_was_killed_goes_on(
    deployed: World, nvila: Nvila, tmp_path: Path, number: signal.Signals
) -> None:
    process = started(deployed, tmp_path)
    try:
        until(lambda: watching(deployed), process)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == (75 if number is signal.SIGTERM else -9), said
    # A canary of a killed command stays where it is, and nobody is at work on it.
    assert deployed.service()["spec"]["canary"][0]["trafficPercent"] == 10
    assert bool(deployed.lease()["spec"]["holderIdentity"]) == (number is signal.SIGKILL)
    state = deployed.state()
    deployed.cluster.ahead_s = 61
    done = nvila(*COMMAND, "--interval", 60, "--json")
    # The step's time is that of the cluster: it began before the kill, so it is over now.
    assert done.code == 0, done.err
    assert "going on with step 1 of 1: 10 %" in done.err
    assert state["since"] > 0
    assert done.last_json["state"] == "promoted"
    assert done.last_json["verdicts"][0]["seconds"] >= 60
    assert deployed.weights() == [-1, 0, 10, -1]


def test_going_on_does_every_step_once(deployed: World, canary: Nvila) -> None:
    state = deployed.state()
    deployed.cluster.denied.add(("get", "inferenceservices"))
    assert canary("--steps", "10,50").code == 1
    deployed.cluster.denied.clear()
    assert deployed.state() == state

    def stop_at_fifty(cluster: Any, key: Any) -> None:
        if key[1] == "inferenceservices" and deployed.weights()[-1] == 50:
            cluster.expired = True

    deployed.cluster.on_write.append(stop_at_fifty)
    done = canary("--steps", "10,50")
    assert done.code == 1
    assert "the cluster no longer takes this user's token" in done.err
    assert "log in again and repeat the command" in done.err
    assert deployed.service()["spec"]["canary"][0]["trafficPercent"] == 50
    deployed.cluster.on_write.pop()
    deployed.cluster.expired = False
    done = canary("--steps", "10,50", "--json")
    assert done.code == 0, done.err
    assert [one["percent"] for one in done.last_json["verdicts"]] == [50]
    assert deployed.weights() == [-1, 0, 10, 50, -1]


def test_watches_that_are_cut_are_made_again(deployed: World, canary: Nvila) -> None:
    deployed.kserve.delay_s = 0.3
    deployed.cluster.cut_watches = 2
    done = canary("--steps", "10,100", "--timeout", 20)
    assert done.code == 0, done.err
    assert deployed.cluster.watches > 2
    assert deployed.cluster.cut_watches == 0


@pytest.mark.parametrize("gone_as_event", [True, False], ids=["event", "status"])
def test_a_past_that_is_forgotten_is_read_anew(deployed: World, canary: Nvila, gone_as_event: bool) -> None:
    deployed.kserve.delay_s = 0.3
    deployed.cluster.gone_as_event = gone_as_event
    deployed.cluster.on_write.append(lambda cluster, key: cluster.compact())
    done = canary("--steps", "10", "--timeout", 20)
    assert done.code == 0, done.err
    assert deployed.cluster.gone > 2


def test_an_api_server_that_fails_for_a_moment_is_asked_again(deployed: World, nvila: Nvila) -> None:
    def fail_twice(cluster: Any, key: Any) -> None:
        if key[1] == "inferenceservices" and len(deployed.kserve.seen) == 2:
            cluster.failing = [500, 503]

    deployed.cluster.on_write.append(fail_twice)
    done = nvila("deploy", "eye/2", "--timeout", 10)
    assert done.code == 0, done.err
    assert deployed.cluster.failing == []


@pytest.mark.slow
def test_two_at_once_are_told_apart(deployed: World, nvila: Nvila, tmp_path: Path) -> None:
    process = started(deployed, tmp_path)
    try:
        until(lambda: watching(deployed), process)
        seen = len(deployed.kserve.seen)
        for words in (COMMAND, ["deploy", "eye/1"]):
            done = nvila(*words)
            assert done.code == 2
            assert "works on endpoint 'eye', last seen" in done.err
            assert "nvila status eye --watch" in done.err
        assert len(deployed.kserve.seen) == seen
        # A rollback may come between; the other one notices and stops.
        done = nvila("rollback", "eye", "--json")
        assert done.code == 0, done.err
        assert (done.last_json["state"], done.last_json["version"]) == ("rolled back", "2")
        assert "canary" not in deployed.service()["spec"]
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 2
    assert "somebody else took over endpoint 'eye'" in said
    assert "canary" not in deployed.service()["spec"]
    assert deployed.aliases()["champion"] == 1


@pytest.mark.slow
def test_two_first_deployments_at_once_make_one_endpoint(world: World, tmp_path: Path) -> None:
    world.kserve.delay_s = 1.0
    program = "import sys; from nvila_pipelines.cli import main; sys.exit(main(sys.argv[1:]))"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, "deploy", f"eye/{number}", "--timeout", "10"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2)
    ]
    said = [process.communicate(timeout=120)[1] for process in both]
    codes = [process.returncode for process in both]
    # Either one came too late, or both came one after the other.
    assert 0 in codes, said
    assert set(codes) <= {0, 2}, said
    assert all(
        "works on endpoint" in text or "took over" in text for code, text in zip(codes, said, strict=True) if code
    )
    assert "canary" not in world.service()["spec"]


def test_another_version_waits_for_the_rollout_that_stands_still(deployed: World, canary: Nvila, nvila: Nvila) -> None:
    def expire(cluster: Any, key: Any) -> None:
        if key[1] == "inferenceservices" and deployed.weights()[-1] == 10:
            cluster.expired = True

    deployed.cluster.on_write.append(expire)
    assert canary("--steps", "10").code == 1
    deployed.cluster.on_write.pop()
    deployed.cluster.expired = False
    done = nvila("deploy", "eye/2", "image.tag=7.7.7", "--timeout", 5)
    assert done.code == 2
    assert "a rollout of models:/eye/2 stands at 'stepping'" in done.err
    assert nvila("rollback", "eye").code == 0
    assert nvila("deploy", "eye/2", "image.tag=7.7.7", "--timeout", 5).code == 0


def test_a_first_deployment_that_never_gets_ready_gives_way_to_another(world: World, nvila: Nvila) -> None:
    world.kserve.broken.add("s3://nvila/artifacts/quantize/1")
    done = nvila("deploy", "eye/1", "--timeout", 1)
    assert done.code == 1
    assert "ModelLoadFailed" in done.err
    assert "kubectl get pods -l nvila.dev/endpoint=eye" in done.err
    assert world.aliases() == {"candidate": 2}
    assert nvila("deploy", "eye/2", "--timeout", 5).code == 0
    assert world.aliases()["champion"] == 2


def test_a_registry_that_fails_after_the_promotion_is_told_later(
    deployed: World, nvila: Nvila, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvila.errors import InfrastructureError

    def down(*_: object) -> None:
        raise InfrastructureError("the registry is away", "try again")

    with monkeypatch.context() as patch:
        patch.setattr("nvila_platform.registry.set_alias", down)
        assert nvila("deploy", "eye/2", "--timeout", 5).code == 75
    assert deployed.state()["phase"] == "naming"
    assert deployed.aliases()["champion"] == 1
    seen = len(deployed.kserve.seen)
    done = nvila("deploy", "eye/2", "--timeout", 5, "--json")
    assert done.code == 0, done.err
    assert done.last_json["state"] == "promoted"
    assert len(deployed.kserve.seen) == seen
    assert deployed.aliases() == {"candidate": 2, "champion": 2, "previous": 1}


def test_a_long_wait_shows_that_somebody_is_at_work(
    deployed: World, nvila: Nvila, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvila_platform.rollout.rollout.RENEW_S", 0.2)
    deployed.kserve.broken.add("s3://nvila/artifacts/quantize/2")
    times = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.1):
            times.append(deployed.lease()["spec"]["renewTime"])
            deployed.cluster.ahead_s += 1

    thread = threading.Thread(target=look)
    thread.start()
    try:
        nvila("deploy", "eye/2", "--timeout", 2)
    finally:
        stop.set()
        thread.join()
    assert len(set(times)) > 4


def test_state_is_one_annotation_of_the_lease(deployed: World) -> None:
    lease = deployed.lease()
    assert list(lease["metadata"]["annotations"]) == ["nvila.dev/rollout"]
    assert lease["metadata"]["labels"] == {"nvila.dev/endpoint": "eye"}
    state = json.loads(lease["metadata"]["annotations"]["nvila.dev/rollout"])
    assert state["live"]["version"] == "1"
    assert len(json.dumps(state)) < 20_000
