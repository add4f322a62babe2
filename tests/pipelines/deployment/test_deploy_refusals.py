"""What `nvila deploy` refuses, and that nothing is changed then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nvila_platform.registry import tag_version

if TYPE_CHECKING:
    from tests.pipelines.deployment.conftest import World

Nvila = Callable[..., Any]


def written(world: World) -> list[tuple[str, str]]:
    """Return what was written of what KServe acts on."""
    return [
        (verb, plural) for verb, _, plural in world.cluster.calls if plural == "inferenceservices" and verb == "patch"
    ]


@pytest.mark.parametrize(
    ("groups", "more", "says", "fix"),
    [
        (set(), (), "no serving.kserve.io: KServe is not installed", "helm install kserve-crd"),
        (
            {"serving.kserve.io"},
            ("autoscaling.class=keda", "autoscaling.keda.serverAddress=http://p:9090"),
            "no keda.sh: KEDA is not installed",
            "helm install keda",
        ),
        ({"serving.kserve.io"}, ("--mode", "knative"), "no serving.knative.dev: Knative Serving", "knative.dev"),
        ({"serving.kserve.io"}, ("--policy", "policy.yaml"), "no gateway.networking.k8s.io", "kubectl apply -f"),
    ],
    ids=["kserve", "keda", "knative", "gateway"],
)
def test_a_part_that_is_missing_is_named_with_what_adds_it(
    world: World, nvila: Nvila, groups: set[str], more: tuple[str, ...], says: str, fix: str
) -> None:
    world.cluster.groups = groups
    done = nvila("deploy", "eye/1", *more)
    assert done.code == 1
    assert says in done.err
    assert fix in done.err
    assert world.cluster.resources == {}


@pytest.mark.parametrize(
    ("verb", "plural"),
    [
        ("get", "inferenceservices"),
        ("get", "leases"),
        ("create", "leases"),
        ("patch", "leases"),
        ("patch", "servingruntimes"),
        ("patch", "inferenceservices"),
    ],
)
def test_a_right_that_is_missing_is_named(world: World, nvila: Nvila, verb: str, plural: str) -> None:
    world.cluster.denied.add((verb, plural))
    done = nvila("deploy", "eye/1", "--timeout", 2)
    assert done.code == 1
    assert f'cannot {verb} resource "{plural}"' in done.err
    assert 'in the namespace "models"' in done.err
    assert "charts/nvila-platform" in done.err
    world.cluster.denied.clear()
    assert nvila("deploy", "eye/1", "--timeout", 5).code == 0


def test_an_old_kserve_is_told_from_a_wrong_manifest(deployed: World, nvila: Nvila) -> None:
    known = deployed.cluster.errors

    def without_canaries(document: dict[str, Any]) -> list[str]:
        return (
            ['strict decoding error: unknown field "spec.canary"']
            if document["spec"].get("canary")
            else known(document)
        )

    deployed.cluster.errors = without_canaries
    done = nvila("deploy", "eye/2", "--timeout", 2)
    assert done.code == 1
    assert "KServe has no spec.canary" in done.err
    assert "upgrade KServe to 0.20" in done.err
    # Nothing is under way, so another version may be deployed.
    assert deployed.state()["plan"] is None


def test_weights_that_nothing_would_split_by_are_refused(deployed: World, canary: Nvila) -> None:
    deployed.cluster.remove(("gateway.networking.k8s.io", "httproutes", "eye"))
    seen = len(deployed.kserve.seen)
    done = canary("--steps", "10")
    assert done.code == 1
    assert "has no HTTPRoute, so nothing splits its traffic" in done.err
    assert "enableGatewayApi" in done.err
    assert len(deployed.kserve.seen) == seen


def test_a_route_that_does_not_follow_is_noticed(deployed: World, canary: Nvila) -> None:
    deployed.kserve.ignores_weights = True
    done = canary("--steps", "10", "--json")
    assert done.code == 1
    assert "the route gives canary" in done.last_json["reason"]
    assert "0 % instead of 10 %" in done.last_json["reason"]
    assert "canary" not in deployed.service()["spec"]


def test_what_somebody_else_made_is_not_touched(world: World, nvila: Nvila) -> None:
    key = ("serving.kserve.io", "inferenceservices", "eye")
    marks = {"app.kubernetes.io/managed-by": "Helm"}
    notes = {"serving.kserve.io/deploymentMode": "Standard"}
    spec = {"predictor": {"name": "x", "minReplicas": 1, "model": {"storageUri": "s3://a/b"}}}
    world.cluster.put(key, {"metadata": {"name": "eye", "labels": marks, "annotations": notes}, "spec": spec})
    done = nvila("deploy", "eye/1")
    assert done.code == 2
    assert "InferenceService 'eye' in namespace 'models' is managed by Helm" in done.err
    assert "--name" in done.err
    assert written(world) == []


def test_fields_that_somebody_else_manages_are_named(deployed: World, nvila: Nvila) -> None:
    key = ("serving.kserve.io", "inferenceservices", "eye")
    deployed.cluster.applied[(key, "argocd")] = {"spec": {"predictor": {"minReplicas": 7}}}
    done = nvila("deploy", "eye/2", "--timeout", 2)
    assert done.code == 2
    assert "somebody else manages it" in done.err
    assert '"argocd"' in done.err


def test_a_mode_is_not_changed(deployed: World, nvila: Nvila) -> None:
    deployed.cluster.groups.add("serving.knative.dev")
    done = nvila("deploy", "eye/2", "--mode", "knative")
    assert done.code == 2
    assert "runs in mode Standard, which KServe does not change" in done.err


def test_an_endpoint_without_its_state_is_not_guessed_at(deployed: World, nvila: Nvila) -> None:
    deployed.cluster.remove(("coordination.k8s.io", "leases", "eye-rollout"))
    seen = len(deployed.kserve.seen)
    done = nvila("deploy", "eye/2")
    assert done.code == 2
    assert "the state of endpoint 'eye' is gone" in done.err
    assert len(deployed.kserve.seen) == seen


def test_an_endpoint_that_was_deleted_is_made_again(deployed: World, nvila: Nvila) -> None:
    deployed.cluster.remove(("serving.kserve.io", "inferenceservices", "eye"))
    done = nvila("deploy", "eye/2", "--timeout", 5)
    assert done.code == 0, done.err
    assert "making endpoint eye" in done.err
    assert "canary" not in deployed.service()["spec"]


@pytest.mark.parametrize(
    ("words", "says", "fix"),
    [
        ((), "0 models are named", "nvila deploy models:/NAME@ALIAS"),
        (("eye/1", "eye/2"), "2 models are named", "nvila deploy"),
        (("eye@champoin",), "no alias 'champoin'", "candidate"),
        (("eye/9",), "no version 9", "known: 1, 2"),
        (("eye/1", "--steps", "10"), "--steps need something that decides", "--policy"),
        (("eye/1", "--policy", "policy.yaml", "--steps", "50,10"), "no growing percentages", "--steps 10,50,100"),
        (("eye/1", "--policy", "policy.yaml", "--steps", "0,101"), "no growing percentages", "--steps 10,50,100"),
        (("eye/1", "--policy", "tasks.yaml"), "no section 'live'", "add live:"),
        (("eye/1", "--policy", "policy.yaml", "--prometheus", "prom:9090"), "no address of Prometheus", "http://"),
        (("eye/1", "--name", "Eye"), "'Eye' cannot name an endpoint", "small letters"),
        (("eye/1", "--name", "e" * 45), "has 45 characters", "fit into KServe's labels"),
        (("eye/1", "--alias", "best"), "--alias best is unknown", "champion"),
        (("eye/1", "image.tga=1"), "no value 'image.tga'", "tag"),
        (("eye/1", "image.tag=1.20"), "image.tag is 1.2: input should be a valid string", "quote it"),
        (("eye/1", "image.tag.x=1"), "image.tag is {'x': 1}", "README"),
        (("eye/1", "image=x", "image.tag=2"), "image is a value, not a section", "image="),
        (("eye/1", "model.version=9"), "model.version comes from the registry", "leave it out"),
        (("eye/1", "=3"), "'=3' is no value", "KEY=VALUE"),
        (("eye/1", "--values", "none.yaml"), "none.yaml cannot be read", "path"),
        (("eye/1", "--values", "list.yaml"), "list.yaml holds no values", "KEY: VALUE"),
    ],
)
def test_wrong_words_are_one_line_with_a_fix(
    world: World, nvila: Nvila, tmp_path: Path, words: tuple[str, ...], says: str, fix: str
) -> None:
    (tmp_path / "tasks.yaml").write_text("tasks: {easy_vqa: {min_score: 0.9}}")
    (tmp_path / "list.yaml").write_text("[1]")
    done = nvila("deploy", *words, "--timeout", 2)
    assert done.code == 2, done.err
    assert says in done.err
    assert fix in done.err
    assert written(world) == []


def test_without_prometheus_nothing_can_be_judged(world: World, nvila: Nvila, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVILA_PROMETHEUS_URL")
    done = nvila("deploy", "eye/1", "--policy", "policy.yaml")
    assert done.code == 2
    assert "NVILA_PROMETHEUS_URL" in done.err


def test_a_version_that_the_gate_refused_is_not_deployed(world: World, nvila: Nvila) -> None:
    tags = {"nvila.gate.state": "refused", "nvila.gate.reason": "chartqa drop is 0.1"}
    tag_version(world.settings, "models:/eye/2", tags)
    done = nvila("deploy", "eye/2")
    assert done.code == 1
    assert "the gate refused models:/eye/2: chartqa drop is 0.1" in done.err
    assert world.cluster.resources == {}


def test_licences_are_told_and_do_not_stop(world: World, nvila: Nvila) -> None:
    tag_version(world.settings, "models:/eye/1", {"nvila.licence": "cc-by-nc-sa-4.0"})
    done = nvila("deploy", "eye/1", "--dry-run", "--json")
    assert done.code == 0
    said = "models:/eye/1: these weights must not be used commercially: their licence is cc-by-nc-sa-4.0"
    assert done.last_json["warnings"] == [said]
    assert "warning: models:/eye/1: these weights must not" in done.err


def test_artifacts_of_this_machine_are_out_of_a_clusters_reach(world: World, nvila: Nvila) -> None:
    from nvila_platform.registration import register_model
    from nvila_platform.store import ArtifactRef

    ref = ArtifactRef(step="quantize", key="3" * 64, digest="3" * 64, uri="/srv/nvila/artifacts/quantize/3")
    register_model(world.settings, "eye", ref, None, {"nvila.gate.state": "passed"})
    done = nvila("deploy", "eye/3")
    assert done.code == 2
    assert "models:/eye/3 is in the folder /srv/nvila/artifacts/quantize/3" in done.err
    done = nvila("deploy", "eye/3", "model.storageUri=pvc://models/eye", "--timeout", 5, "--json")
    assert done.code == 0, done.err
    assert world.predictor()["model"]["storageUri"] == "pvc://models/eye"


def test_a_gate_needs_tasks(world: World, nvila: Nvila) -> None:
    done = nvila("gate", "eye/1", "--policy", "policy.yaml")
    assert done.code == 2
    assert "no tasks, only limits of a rollout" in done.err


def test_the_mode_of_the_values_is_the_one_of_the_command(world: World, nvila: Nvila, tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text("deploymentMode: Knative\n")
    done = nvila("deploy", "eye/1", "--values", file)
    assert done.code == 2
    assert "deploymentMode is Knative, and --mode is standard" in done.err
    assert written(world) == []
    file.write_text("deploymentMode: Standard\n")
    assert nvila("deploy", "eye/1", "--values", file, "--timeout", 5).code == 0
