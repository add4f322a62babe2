"""`nvila deploy` against an API server, KServe's answers and a Prometheus, all over HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.charts.crd_validation import CrdSchemas
    from tests.pipelines.deployment.conftest import World

Nvila = Callable[..., Any]


def test_a_first_deployment_makes_the_endpoint(world: World, nvila: Nvila) -> None:
    done = nvila("deploy", "models:/eye/1", "--json", "--timeout", 5, "image.tag=0.3.0")
    assert done.code == 0, done.err
    said = done.last_json
    assert (said["state"], said["endpoint"], said["namespace"], said["version"]) == ("promoted", "eye", "models", "1")
    assert said["url"] == "http://eye.models.example.org"
    predictor = world.predictor()
    assert predictor["name"] == said["revision"]
    assert predictor["model"]["storageUri"] == "s3://nvila/artifacts/quantize/1"
    assert predictor["model"]["args"] == ["--version", "1", "--digest", f"{1:064x}"]
    assert predictor["labels"] == {"nvila.dev/model-version": "1", "nvila.dev/model-digest": "0" * 16}
    assert predictor["annotations"]["nvila.dev/model"] == "models:/eye/1"
    assert "canary" not in world.service()["spec"]
    runtime = world.cluster.named("servingruntimes", predictor["model"]["runtime"])
    assert runtime is not None
    assert runtime["spec"]["containers"][0]["image"] == "nvila/serve:0.3.0"
    assert world.aliases() == {"candidate": 2, "champion": 1}
    # Nothing of the rollout is on the InferenceService, whose annotations KServe copies to the pods.
    assert not [key for key in world.service()["metadata"]["annotations"] if "rollout" in key]


def test_a_canary_that_users_like_is_promoted(deployed: World, canary: Nvila) -> None:
    done = canary("--steps", "10,50,100", "--json")
    assert done.code == 0, done.err
    said = done.last_json
    assert said["state"] == "promoted"
    assert [one["percent"] for one in said["verdicts"]] == [10, 50, 100]
    assert all(one["passed"] and one["seconds"] >= 1 for one in said["verdicts"])
    assert deployed.weights() == [-1, 0, 10, 50, 100, -1]
    assert deployed.predictor()["model"]["storageUri"].endswith("/2")
    assert deployed.kserve.served == [deployed.kserve.served[0], said["revision"]]
    assert deployed.aliases() == {"candidate": 2, "champion": 2, "previous": 1}
    verdict = json.loads(Path(said["file"]).read_text())
    assert verdict["passed"] is True
    assert [check["name"] for check in verdict["checks"]] == ["live requests", "live error rate", "live ttft p95_ms"]
    assert "step 2 of 3: 50 %" in done.err


def test_a_canary_has_a_fixed_number_of_pods_that_suits_its_share(deployed: World, canary: Nvila) -> None:
    deployed.kserve.pods = 3
    assert canary("--steps", "10,50,100").code == 0
    canaries = [spec["canary"][0] for spec in deployed.kserve.seen if spec.get("canary")]
    pods = {one["trafficPercent"]: one["predictor"]["minReplicas"] for one in canaries}
    # Three of the stable one, and those that the canary has at the step before; four is the most.
    assert pods == {0: 1, 10: 1, 50: 2, 100: 4}
    assert not {"maxReplicas", "scaleMetric", "scaleTarget", "autoScaling"} & canaries[0]["predictor"].keys()
    assert deployed.predictor()["maxReplicas"] == 4


def test_bad_metrics_roll_back_at_once(deployed: World, canary: Nvila) -> None:
    before = deployed.service()["spec"]
    deployed.users.of["-v2-"] = {"failed": 30}
    done = canary("--steps", "10,100", "--interval", 60, "--json")
    assert done.code == 1
    said = done.last_json
    assert (said["state"], said["version"]) == ("rolled back", "2")
    assert said["reason"] == "at 10 %: live error rate is 0.2308, the limit is 0.0500"
    assert "error: models:/eye/2 was rolled back: at 10 %" in done.err
    assert deployed.service()["spec"] == before
    assert deployed.weights() == [-1, 0, 10, -1]
    assert deployed.aliases() == {"candidate": 2, "champion": 1}
    assert len(deployed.runtimes()) == 1
    assert json.loads(Path(said["file"]).read_text())["passed"] is False
    assert deployed.state()["outcome"]["state"] == "rolled back"
    assert deployed.lease()["spec"]["holderIdentity"] == ""


def test_slow_first_tokens_roll_back_too(deployed: World, canary: Nvila) -> None:
    deployed.users.of["-v2-"] = {"ttft_s": 0.9}
    done = canary()
    assert done.code == 1
    assert "live ttft p95_ms is 900.0000, the limit is 500.0000" in done.err


def test_first_tokens_are_compared_with_those_of_the_live_model(deployed: World, canary: Nvila, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("live: {max_ttft_ratio: 1.5}")
    deployed.users.of["-v2-"] = {"ttft_s": 0.31}
    done = canary("--steps", "50")
    assert done.code == 1
    assert "live ttft ratio is 1.5500, the limit is 1.5000" in done.err


def test_too_few_requests_are_waited_for_and_then_refuse(deployed: World, canary: Nvila) -> None:
    deployed.users.of["-v2-"] = {"ok": 5}
    done = canary("--steps", "10", "--json")
    assert done.code == 1
    assert done.last_json["reason"] == "at 10 %: live requests is 5.0000, the limit is 20.0000"
    assert done.last_json["verdicts"][0]["seconds"] >= 4


def test_metrics_that_are_away_promote_nothing(deployed: World, canary: Nvila) -> None:
    deployed.users.down = 503
    done = canary("--steps", "10", "--json")
    assert done.code == 1
    assert "failed with 503" in done.last_json["reason"]
    assert deployed.aliases()["champion"] == 1


def test_pods_that_never_get_ready_are_taken_away_with_the_reason(deployed: World, nvila: Nvila) -> None:
    deployed.kserve.broken.add("s3://nvila/artifacts/quantize/2")
    done = nvila("deploy", "eye/2", "--timeout", 1, "--json")
    assert done.code == 1
    reason = done.last_json["reason"]
    assert "did not get ready in 1 s" in reason
    assert "ModelLoadFailed: weights.safetensors is damaged (exit code 1)" in reason
    assert "canary" not in deployed.service()["spec"]
    assert deployed.aliases()["champion"] == 1


def test_without_a_policy_traffic_moves_when_the_pods_are_ready(deployed: World, nvila: Nvila) -> None:
    done = nvila("deploy", "eye/2", "--timeout", 5)
    assert done.code == 0, done.err
    assert deployed.weights() == [-1, 0, -1]
    assert deployed.users.queries == []


def test_what_serves_already_is_left_alone(deployed: World, nvila: Nvila) -> None:
    seen = len(deployed.kserve.seen)
    done = nvila("deploy", "eye/1", "--json")
    assert done.code == 0
    assert done.last_json["state"] == "unchanged"
    assert len(deployed.kserve.seen) == seen


def test_another_image_is_rolled_out_like_another_model(deployed: World, nvila: Nvila) -> None:
    before = deployed.predictor()
    assert nvila("deploy", "eye/1", "image.tag=0.9.0", "--timeout", 5).code == 0
    after = deployed.predictor()
    assert before["name"] != after["name"]
    assert before["model"]["runtime"] != after["model"]["runtime"]
    # The one before stays: a rollback needs it.
    assert deployed.runtimes() == {before["model"]["runtime"], after["model"]["runtime"]}
    assert nvila("deploy", "eye/1", "image.tag=0.9.1", "--timeout", 5).code == 0
    assert before["model"]["runtime"] not in deployed.runtimes()


def test_knative_splits_between_revisions(world: World, nvila: Nvila, canary: Nvila) -> None:
    world.cluster.groups.add("serving.knative.dev")
    more = ("--mode", "knative", "autoscaling.minReplicas=0")
    done = nvila("deploy", "eye/1", "--timeout", 5, *more)
    assert done.code == 0, done.err
    done = canary("--steps", "20,100", *more)
    assert done.code == 0, done.err
    shares = [spec["predictor"].get("canaryTrafficPercent") for spec in world.kserve.seen]
    assert list(dict.fromkeys(shares)) == [None, 0, 20, 100]
    assert shares[-1] is None
    assert world.kserve.served == ["eye-predictor-00001", "eye-predictor-00002"]
    assert world.predictor()["minReplicas"] == 0
    assert 'pod=~"eye-predictor-00002-deployment-.+"' in world.users.queries[0]


def test_knative_goes_back_without_a_third_revision(world: World, nvila: Nvila, canary: Nvila) -> None:
    world.cluster.groups.add("serving.knative.dev")
    assert nvila("deploy", "eye/1", "--mode", "knative", "--timeout", 5).code == 0
    world.users.of["00002"] = {"failed": 50}
    assert canary("--steps", "20", "--mode", "knative").code == 1
    assert world.predictor()["canaryTrafficPercent"] == 0
    traffic = world.service()["status"]["components"]["predictor"]["traffic"]
    assert {one["revisionName"]: one["percent"] for one in traffic} == {
        "eye-predictor-00001": 100,
        "eye-predictor-00002": 0,
    }
    world.users.of.clear()
    assert canary("--steps", "20", "--mode", "knative").code == 0
    assert world.kserve.served == ["eye-predictor-00001", "eye-predictor-00002"]


def test_a_dry_run_prints_manifests_and_touches_nothing(world: World, nvila: Nvila, crds: CrdSchemas) -> None:
    import yaml

    done = nvila("deploy", "eye/2", "--dry-run", "--namespace", "team", "--name", "eyes")
    assert done.code == 0, done.err
    runtime, service = yaml.safe_load_all(done.out)
    assert (runtime["kind"], service["kind"]) == ("ServingRuntime", "InferenceService")
    assert service["metadata"]["namespace"] == runtime["metadata"]["namespace"] == "team"
    assert service["spec"]["predictor"]["model"]["runtime"] == runtime["metadata"]["name"]
    for document in (runtime, service):
        assert crds.errors(document) == []
    # docs/install.md takes the model's folder from here with sed.
    assert re.findall(r"(?m)^ *storageUri: (.*)$", done.out) == ["s3://nvila/artifacts/quantize/2"]
    assert world.cluster.calls == []
    assert nvila("deploy", "eye/2", "--dry-run", "--json").last_json["manifests"][1]["metadata"]["name"] == "eye"


def test_values_are_those_of_the_chart(world: World, nvila: Nvila, tmp_path: Path) -> None:
    world.cluster.groups.add("keda.sh")
    (tmp_path / "values.yaml").write_text(
        "autoscaling: {class: keda, keda: {serverAddress: 'http://p:9090', metric: visual_load, target: 8000}}\n"
        "route: {enabled: true}\nserviceAccount: {name: nvila-eyes}\n"
    )
    done = nvila("deploy", "eye/1", "--values", "values.yaml", "autoscaling.maxReplicas=8", "--timeout", 5, "--json")
    assert done.code == 0, done.err
    predictor = world.predictor()
    assert (predictor["maxReplicas"], predictor["serviceAccountName"]) == (8, "nvila-eyes")
    external = predictor["autoScaling"]["metrics"][0]["external"]
    # KServe tells KEDA no type, and KEDA then divides by the number of pods.
    assert external["target"] == {"type": "AverageValue", "value": "8000", "averageValue": "8000"}
    of = '{namespace="models",model_name="eye"}'
    assert external["metric"]["query"] == f"avg_over_time(sum(nvila:visual_load_tokens{of})[2m:15s])"
    assert "only the chart makes these" in done.last_json["warnings"][0]
    assert world.service()["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "keda"


@pytest.mark.parametrize("offset", [0, 120], ids=["a canary of now", "a clock that is ahead"])
def test_the_clock_is_that_of_the_cluster(deployed: World, canary: Nvila, offset: float) -> None:
    deployed.cluster.ahead_s = offset
    done = canary("--steps", "50", "--json")
    assert done.code == 0, done.err
    assert 1 <= done.last_json["verdicts"][0]["seconds"] < 20
