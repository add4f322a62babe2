"""`nvila rollback` and `nvila status`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.pipelines.deployment.conftest import World

Nvila = Callable[..., Any]


def test_a_rollback_brings_back_what_served_before(deployed: World, nvila: Nvila) -> None:
    first = deployed.predictor()
    assert nvila("deploy", "eye/2", "--timeout", 5).code == 0
    done = nvila("rollback", "eye", "--json", "--timeout", 5)
    assert done.code == 0, done.err
    assert (done.last_json["state"], done.last_json["version"]) == ("promoted", "1")
    assert deployed.predictor() == first
    # New pods came up beside the others before any traffic moved.
    assert deployed.weights() == [-1, 0, -1, 0, -1]
    assert deployed.aliases() == {"candidate": 2, "champion": 1, "previous": 2}
    done = nvila("rollback", "eye", "--json", "--timeout", 5)
    assert done.last_json["version"] == "2"
    assert deployed.aliases() == {"candidate": 2, "champion": 2, "previous": 1}


def test_a_rollback_that_stopped_half_way_goes_on(deployed: World, nvila: Nvila) -> None:
    assert nvila("deploy", "eye/2", "--timeout", 5).code == 0

    def expire(cluster: Any, key: Any) -> None:
        cluster.expired = key[1] == "inferenceservices"

    deployed.cluster.on_write.append(expire)
    assert nvila("rollback", "eye", "--timeout", 5).code == 1
    deployed.cluster.on_write.pop()
    deployed.cluster.expired = False
    done = nvila("rollback", "eye", "--json", "--timeout", 5)
    assert (done.last_json["state"], done.last_json["version"]) == ("promoted", "1")


def test_a_rollback_needs_something_to_go_back_to(deployed: World, nvila: Nvila) -> None:
    done = nvila("rollback", "eye")
    assert done.code == 2
    assert "nothing served this endpoint before" in done.err
    done = nvila("rollback", "ear")
    assert done.code == 2
    assert "no endpoint 'ear' that nvila deployed" in done.err
    assert deployed.aliases()["champion"] == 1


def test_a_rollback_of_a_first_deployment_has_nothing_either(world: World, nvila: Nvila) -> None:
    world.kserve.broken.add("s3://nvila/artifacts/quantize/1")
    assert nvila("deploy", "eye/1", "--timeout", 1).code == 1
    done = nvila("rollback", "eye")
    assert done.code == 2
    assert "nothing served this endpoint before" in done.err


def test_a_status_has_a_row_for_every_revision(deployed: World, canary: Nvila, nvila: Nvila) -> None:
    def expire(cluster: Any, key: Any) -> None:
        if key[1] == "inferenceservices" and deployed.weights()[-1] == 10:
            cluster.expired = True

    deployed.kserve.pods = 3
    deployed.cluster.on_write.append(expire)
    canary("--steps", "10,50")
    deployed.cluster.on_write.pop()
    deployed.cluster.expired = False
    done = nvila("status", "eye", "--json")
    assert done.code == 0, done.err
    (endpoint,) = done.last_json["endpoints"]
    rows = [(row["version"], row["traffic"], row["replicas"], row["ready"]) for row in endpoint["rows"]]
    assert rows == [("1", 90, 3, True), ("2", 10, 1, True)]
    assert endpoint["rollout"]["phase"] == "stepping"
    assert endpoint["rests"] is False
    done = nvila("status")
    head, first, second, _, note = done.out.splitlines()
    assert head.split() == ["endpoint", "revision", "traffic", "replicas", "ready", "model", "digest", "url"]
    assert first.split()[2:7] == ["90", "%", "3", "yes", "models:/eye/1"]
    assert second.split()[2:7] == ["10", "%", "1", "yes", "models:/eye/2"]
    assert "rollout of v2-" in note
    assert "step 1 of 2" in note


def test_a_status_says_why_something_is_not_ready(world: World, nvila: Nvila) -> None:
    world.kserve.broken.add("s3://nvila/artifacts/quantize/1")
    nvila("deploy", "eye/1", "--timeout", 1)
    done = nvila("status", "eye")
    assert "ModelLoadFailed: weights.safetensors is damaged (exit code 1)" in done.out
    assert " no " in done.out
    assert "at promoting, by nobody; the same nvila deploy goes on" in done.out


def test_a_status_tells_how_the_last_rollout_ended(deployed: World, canary: Nvila, nvila: Nvila) -> None:
    deployed.users.of["-v2-"] = {"failed": 30}
    canary("--steps", "10")
    assert "was rolled back: at 10 %: live error rate" in nvila("status", "eye").out


def test_a_status_of_nothing(world: World, nvila: Nvila) -> None:
    assert nvila("status").out == "nothing is deployed in namespace models: nvila deploy MODEL\n"
    assert nvila("status", "--json").last_json == {"namespace": "models", "endpoints": []}
    done = nvila("status", "eye")
    assert done.code == 2
    assert "no endpoint 'eye'" in done.err


def test_an_unknown_endpoint_is_answered_with_the_known(deployed: World, nvila: Nvila) -> None:
    assert "known: eye" in nvila("status", "eyes").err


def test_a_status_can_be_watched_until_it_rests(world: World, nvila: Nvila) -> None:
    world.kserve.broken.add("s3://nvila/artifacts/quantize/1")
    nvila("deploy", "eye/1", "--timeout", 1)
    world.kserve.broken.clear()
    key = ("serving.kserve.io", "inferenceservices", "eye")

    def heal() -> None:
        world.kserve(world.cluster, key)
        assert nvila_again("deploy", "eye/1", "--timeout", "10") == 0

    from nvila_pipelines.cli import main

    def nvila_again(*words: str) -> int:
        return main(list(words))

    timer = threading.Timer(1.0, heal)
    timer.start()
    try:
        done = nvila("status", "eye", "--watch")
    finally:
        timer.join()
    assert done.code == 0
    assert done.out.count("endpoint") >= 2
    before, last = done.out.rsplit("endpoint", 1)
    assert "ModelLoadFailed" in before
    assert "rollout of" in before
    assert last.splitlines()[1].split()[5] == "yes"
    assert "rollout of" not in last


def test_knative_shows_shares_of_revisions(world: World, canary: Nvila, nvila: Nvila) -> None:
    world.cluster.groups.add("serving.knative.dev")
    assert nvila("deploy", "eye/1", "--mode", "knative", "--timeout", 5).code == 0
    world.users.of["00002"] = {"failed": 50}
    canary("--steps", "20", "--mode", "knative")
    (endpoint,) = nvila("status", "eye", "--json").last_json["endpoints"]
    rows = [(row["revision"], row["version"], row["traffic"]) for row in endpoint["rows"]]
    assert rows == [("eye-predictor-00001", "1", 100), ("eye-predictor-00002", "2", 0)]


def test_no_rights_to_look_are_named(deployed: World, nvila: Nvila) -> None:
    deployed.cluster.denied.add(("list", "inferenceservices"))
    done = nvila("status")
    assert done.code == 1
    assert 'cannot list resource "inferenceservices"' in done.err


def test_a_cluster_without_kserve_has_no_status(world: World, nvila: Nvila) -> None:
    world.cluster.groups = set()
    done = nvila("status")
    assert done.code == 1
    assert "the cluster has no inferenceservices.serving.kserve.io" in done.err
