"""`nvila deploy` and charts/nvila-serving make the same resources, over the chart's matrix of values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from nvila.errors import ConfigError
from nvila_platform.cluster.inference_service import build, inference_service, labels
from nvila_platform.cluster.serving_runtime import Mode
from nvila_platform.cluster.serving_values import CHART_ONLY, ServingValues, parse_values

if TYPE_CHECKING:
    from tests.charts.conftest import Document
    from tests.charts.crd_validation import CrdSchemas

    Render = Callable[..., list[Document]]

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "nvila-serving"
APIS = ("--api-versions", "keda.sh/v1alpha1", "--api-versions", "gateway.networking.k8s.io/v1")
MATRIX: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "serving_matrix.yaml").read_text("utf-8"))
each_row = pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
# Rows that only Standard mode takes.
STANDARD_ONLY = {
    "gpu",
    "scheduling",
    "volumes",
    "runtime-class",
    "keda",
    "keda-by-visual-load",
    "keda-by-latency",
    "keda-to-zero",
}


def taken(values: dict[str, Any]) -> ServingValues:
    """Read a row as `nvila deploy` does. By default the chart makes the account, and a deployment does not."""
    raw = {key: value for key, value in values.items() if key not in (*CHART_ONLY, "deploymentMode")}
    raw["serviceAccount"] = {"create": True} | raw.get("serviceAccount", {})
    return parse_values(raw, "row")


def made(endpoint: str, values: dict[str, Any], mode: Mode = "Standard") -> tuple[Document, Document]:
    found = taken(values)
    revision, runtime = build(endpoint, "models", found, mode, "")
    return runtime, inference_service(endpoint, revision, labels(endpoint, found))


def neutral(document: Document) -> Document:
    """Take out what differs by design: names by content, and who manages the resource."""
    found: Document = json.loads(json.dumps(document))
    found["metadata"].pop("namespace", None)
    # A deployment has those that KServe reads; the rest are the chart's alone.
    annotations = found["metadata"].pop("annotations", {})
    found["metadata"]["annotations"] = {k: v for k, v in annotations.items() if k.startswith("serving.kserve.io/")}
    for key in ("helm.sh/chart", "app.kubernetes.io/version", "app.kubernetes.io/managed-by", "nvila.dev/endpoint"):
        found["metadata"]["labels"].pop(key, None)
    for key in ("app.kubernetes.io/name", "app.kubernetes.io/instance"):
        found["metadata"]["labels"].pop(key)
    if found["kind"] == "ServingRuntime":
        found["metadata"].pop("name")
        for container in found["spec"]["containers"]:
            container["args"] = [str(word) for word in container["args"]]
    else:
        found["spec"]["predictor"].pop("name", None)
        found["spec"]["predictor"]["model"].pop("runtime")
    return found


@each_row
def test_both_make_the_same_resources(render: Render, values: dict[str, Any]) -> None:
    documents = {document["kind"]: document for document in render(CHART, values, extra=APIS)}
    service = documents["InferenceService"]
    name = service["metadata"]["name"]
    if len(name) == 48:
        # Revisions have names of their own, so an endpoint of many has less room for its name than the chart's one.
        with pytest.raises(ConfigError, match="has 48 characters"):
            made(name, values)
        return
    runtime, own = made(name, values)
    assert neutral(own) == neutral(service)
    assert neutral(runtime) == neutral(documents["ServingRuntime"])


@each_row
@pytest.mark.parametrize("mode", ["Standard", "Knative"])
def test_all_of_them_match_the_definitions(values: dict[str, Any], mode: Mode, crds: CrdSchemas) -> None:
    name = next(row for row, found in MATRIX.items() if found is values)
    if mode == "Knative" and name in STANDARD_ONLY:
        with pytest.raises(ConfigError, match="Knative"):
            made("eye", values, mode)
        return
    for document in made("eye", values, mode):
        assert crds.errors(document) == []


def test_knative_gets_nothing_that_it_refuses() -> None:
    runtime, service = made("eye", {}, "Knative")
    (container,) = runtime["spec"]["containers"]
    assert not {"lifecycle", "startupProbe", "livenessProbe"} & container.keys()
    assert container["ports"][0]["name"] == "http1"
    assert container["securityContext"]["runAsUser"] == 10001
    predictor = service["spec"]["predictor"]
    refused = {"terminationGracePeriodSeconds", "securityContext", "topologySpreadConstraints", "name", "autoScaling"}
    assert not refused & predictor.keys()
    assert (predictor["scaleMetric"], predictor["scaleTarget"], predictor["containerConcurrency"]) == (
        "concurrency",
        4,
        0,
    )


def test_defaults_are_those_of_the_chart() -> None:
    chart = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert taken(chart) == taken({})
    assert set(CHART_ONLY) < chart.keys()


def test_another_image_is_another_runtime_and_another_model_is_not() -> None:
    def build_with(**changed: Any) -> Any:
        return build("eye", "models", parse_values(changed, "x"), "Standard", "")[0]

    plain = build_with()
    image = build_with(image={"tag": "9.9.9"})
    model = build_with(model={"version": "8", "digest": "b" * 64, "storageUri": "s3://a/b"})
    assert len({plain.runtime, image.runtime}) == 2
    assert model.runtime == plain.runtime
    assert len({plain.name, image.name, model.name}) == 3
    assert model.name.startswith("v8-")
    assert build_with() == plain


@pytest.mark.parametrize(
    ("values", "says", "hint"),
    [
        ({"imgae": {}}, "there is no value 'imgae'", "image"),
        ({"autoscaling": {"maxReplica": 3}}, "no value 'autoscaling.maxReplica'", "maxReplicas"),
        ({"autoscaling": {"keda": {"targte": 3}}}, "no value 'autoscaling.keda.targte'", "target"),
        ({"autoscaling": {"minReplicas": 5}}, "maxReplicas is 4, under minReplicas 5", "raise"),
        ({"autoscaling": {"class": "keda"}}, "keda.serverAddress is empty", "Prometheus"),
        ({"server": {"port": "web"}}, "server.port is 'web'", "README"),
        ({"server": {"drainSeconds": 60}}, "leaves nothing after server.drainSeconds 60", "raise"),
        ({"image": {"tag": "latest"}}, "image.tag is latest", "version"),
        ({"image": {"variant": "cpu", "tag": "1"}}, "image.variant chooses", "leave out"),
        ({"playground": {"enabled": False}}, "production", "access.existingSecret"),
        ({"access": {"requestsPerMinute": 5}}, "counts callers", "access"),
        ({"media": {"networks": ["10.0.0.0/8"]}}, "media.networks", "hosts"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], says: str, hint: str) -> None:
    with pytest.raises(ConfigError) as failed:
        parse_values(values, "values.yaml")
    assert says in failed.value.message
    assert failed.value.message.startswith("values.yaml: ")
    assert hint in failed.value.hint


def test_no_pods_need_somebody_who_brings_the_first() -> None:
    values = parse_values({"autoscaling": {"minReplicas": 0}}, "x")
    with pytest.raises(ConfigError, match="nothing would bring a first pod"):
        build("eye", "models", values, "Standard", "")
    assert build("eye", "models", values, "Knative", "")[0].predictor["minReplicas"] == 0
