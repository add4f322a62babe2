"""charts/nvila-serving in the Knative mode of KServe: what it makes, as `nvila deploy` does, and refuses."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from nvila.errors import ConfigError
from nvila_platform.cluster.inference_service import build, inference_service, labels
from nvila_platform.cluster.serving_values import parse_values

if TYPE_CHECKING:
    from tests.charts.built_in_validation import BuiltInSchemas
    from tests.charts.conftest import Document, Helm
    from tests.charts.crd_validation import CrdSchemas

    Render = Callable[..., list[Document]]

CHART = Path(__file__).resolve().parents[2] / "charts" / "nvila-serving"
APIS = ("serving.knative.dev/v1", "keda.sh/v1alpha1", "gateway.networking.k8s.io/v1")
API_FLAGS = tuple(word for api in APIS for word in ("--api-versions", api))
KNATIVE = {"deploymentMode": "Knative"}
ROWS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "to-zero": {"autoscaling": {"minReplicas": 0}},
    "by-rate": {"autoscaling": {"maxReplicas": 9, "knative": {"metric": "rps", "target": 20}}},
    "one-at-a-time": {"autoscaling": {"knative": {"concurrency": 1}}},
    "fixed": {"autoscaling": {"enabled": False, "minReplicas": 3}},
    "registered": {
        "model": {"storageUri": "s3://a/b", "version": "7", "digest": "a" * 64},
        "metrics": {"scrape": False},
    },
    "closed": {"access": {"existingSecret": "keys"}, "playground": {"enabled": False}},
    "behind-its-gateway": {
        "endpoint": {"service": {"name": "kourier", "namespace": "kourier-system", "host": "eyes.models.example.com"}},
        "route": {"enabled": True, "parentRefs": [{"name": "public"}]},
        "networkPolicy": {"allowedNamespaces": ["kourier-system"]},
    },
}
each_row = pytest.mark.parametrize("values", ROWS.values(), ids=ROWS.keys())


def rendered(render: Render, values: dict[str, Any]) -> dict[str, Document]:
    documents = render(CHART, {"fullnameOverride": "eyes", **KNATIVE, **values}, extra=API_FLAGS)
    return {document["kind"]: document for document in documents}


@each_row
def test_everything_is_valid(
    render: Render, crds: CrdSchemas, built_in: BuiltInSchemas, values: dict[str, Any]
) -> None:
    for kind, document in rendered(render, values).items():
        schemas = crds if kind in {"InferenceService", "ServingRuntime", "HTTPRoute"} else built_in
        assert schemas.errors(document) == []


@each_row
def test_it_is_what_deploy_makes(render: Render, values: dict[str, Any]) -> None:
    documents = rendered(render, values)
    taken = {key: value for key, value in values.items() if key not in {"endpoint", "route", "networkPolicy"}}
    found = parse_values({"serviceAccount": {"create": True}, **taken}, "row")
    revision, runtime = build("eyes", "models", found, "Knative", "")
    own = inference_service("eyes", revision, labels("eyes", found))
    for spec in (documents["ServingRuntime"]["spec"], runtime["spec"]):
        (container,) = spec["containers"]
        container["args"] = [str(word) for word in container["args"]]
    assert documents["ServingRuntime"]["spec"] == runtime["spec"]
    predictor = documents["InferenceService"]["spec"]["predictor"]
    predictor["model"].pop("runtime")
    own["spec"]["predictor"]["model"].pop("runtime")
    assert predictor == own["spec"]["predictor"]
    assert documents["InferenceService"]["metadata"]["annotations"] == own["metadata"]["annotations"]


@each_row
def test_knative_gets_nothing_that_it_refuses(render: Render, values: dict[str, Any]) -> None:
    documents = rendered(render, values)
    (container,) = documents["ServingRuntime"]["spec"]["containers"]
    assert not {"lifecycle", "startupProbe", "livenessProbe"} & container.keys()
    assert container["ports"] == [{"name": "http1", "containerPort": 8080, "protocol": "TCP"}]
    predictor = documents["InferenceService"]["spec"]["predictor"]
    assert not {"terminationGracePeriodSeconds", "securityContext", "topologySpreadConstraints"} & predictor.keys()
    # What the pod's context says elsewhere stands at the container.
    context = container["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"], context["runAsNonRoot"]) == (10001, 10001, True)
    assert (context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"]) == (True, False)
    assert "serving.kserve.io/autoscalerClass" not in documents["InferenceService"]["metadata"]["annotations"]


@pytest.mark.parametrize(
    ("row", "replicas", "scaling"),
    [
        ("defaults", (1, 4), ("concurrency", 4, 0)),
        ("to-zero", (0, 4), ("concurrency", 4, 0)),
        ("by-rate", (1, 9), ("rps", 20, 0)),
        ("one-at-a-time", (1, 4), ("concurrency", 4, 1)),
        ("fixed", (3, 3), ("concurrency", 4, 0)),
    ],
)
def test_scaling(render: Render, row: str, replicas: tuple[int, int], scaling: tuple[str, int, int]) -> None:
    predictor = rendered(render, ROWS[row])["InferenceService"]["spec"]["predictor"]
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == replicas
    assert (predictor["scaleMetric"], predictor["scaleTarget"], predictor["containerConcurrency"]) == scaling


def test_knatives_proxy_and_its_measurer_are_let_in(render: Render) -> None:
    (rule,) = rendered(render, ROWS["behind-its-gateway"])["NetworkPolicy"]["spec"]["ingress"]
    assert [one["port"] for one in rule["ports"]] == [8080, 8012, 8013, 9090, 9091]
    (namespaces,) = (one["namespaceSelector"] for one in rule["from"] if "namespaceSelector" in one)
    assert namespaces["matchExpressions"][0]["values"] == ["kourier-system", "knative-serving"]
    on_one_of_them = rendered(render, {"server": {"port": 9090}})["NetworkPolicy"]["spec"]["ingress"][0]["ports"]
    assert [one["port"] for one in on_one_of_them] == [9090, 8012, 8013, 9091]


def test_helm_test_asks_the_one_port_of_knatives_service(render: Render) -> None:
    (container,) = rendered(render, {})["Pod"]["spec"]["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert (environment["SERVICE"], environment["PORTS"]) == ("eyes-predictor.models.svc", "80")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"nodeSelector": {"a": "b"}}, "Knative leaves the place of pods to Knative, and nodeSelector is set"),
        ({"tolerations": [{"operator": "Exists"}]}, "and tolerations is set"),
        ({"affinity": {"nodeAffinity": {}}}, "and affinity is set"),
        ({"topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "z", "whenUnsatisfiable": "DoNotSchedule",
                                         "labelSelector": {}}]}, "and topologySpreadConstraints is set"),
        ({"priorityClassName": "high"}, "and priorityClassName is set"),
        ({"runtimeClassName": "nvidia"}, "and runtimeClassName is set"),
        ({"autoscaling": {"class": "keda", "keda": {"serverAddress": "http://p:9090"}}}, "Knative scales its own"),
        ({"autoscaling": {"enabled": False, "minReplicas": 0}}, "which would be no pods for ever"),
        ({"route": {"enabled": True, "parentRefs": [{"name": "public"}]}}, "Knative's leads to its gateway"),
        ({"autoscaling": {"knative": {"metric": "cpu"}}}, "at '/autoscaling/knative/metric'"),
        ({"autoscaling": {"knative": {"targte": 1}}}, "additional properties 'targte' not allowed"),
        ({"deploymentMode": "Serverless"}, "at '/deploymentMode'"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_by_name(helm: Helm, values: dict[str, Any], said: str) -> None:
    done = helm.template(CHART, KNATIVE | values, extra=API_FLAGS)
    assert done.returncode != 0
    assert said in done.stderr


def test_without_knative_the_way_out_is_named(helm: Helm) -> None:
    done = helm.template(CHART, KNATIVE)
    assert (
        "deploymentMode Knative needs the API serving.knative.dev/v1, which this cluster does not have" in done.stderr
    )
    assert "set deploymentMode=Standard" in done.stderr


def test_no_pods_for_ever_are_refused_by_deploy_too() -> None:
    values = parse_values({"autoscaling": {"enabled": False, "minReplicas": 0}}, "x")
    with pytest.raises(ConfigError, match=r"minReplicas is 0 and autoscaling\.enabled is off"):
        build("eyes", "models", values, "Knative", "")


def notes(helm: Helm, chart: Path, values: dict[str, Any]) -> str:
    """Return what an installation says, on a cluster with Knative, which `helm install` cannot be told without one."""
    text = (chart / "templates" / "NOTES.txt").read_text(encoding="utf-8")
    (chart / "templates" / "_said.tpl").write_text(f'{{{{- define "said" -}}}}{text}{{{{- end }}}}', encoding="utf-8")
    shown = 'apiVersion: v1\nkind: Notes\nsaid: {{ include "said" . | toJson }}\n'
    (chart / "templates" / "said.yaml").write_text(shown, encoding="utf-8")
    done = helm.template(chart, KNATIVE | values, extra=(*API_FLAGS, "--show-only", "templates/said.yaml"))
    assert done.returncode == 0, done.stderr
    said: str = yaml.safe_load(done.stdout)["said"]
    return said


def test_notes_ask_where_knative_listens(helm: Helm, tmp_path: Path) -> None:
    said = notes(helm, shutil.copytree(CHART, tmp_path / "chart"), {})
    assert re.findall(r"^     (\S+) .+$", said, re.MULTILINE) == ["kubectl", "kubectl", "curl"]
    assert "port-forward" not in said
    assert "-o jsonpath='{.status.url}'" in said


def test_notes_around_deploy_name_the_mode(helm: Helm, tmp_path: Path) -> None:
    around = {"endpoint": {"create": False, "service": {"name": "kourier", "namespace": "kourier-system"}}}
    said = notes(helm, shutil.copytree(CHART, tmp_path / "chart"), around)
    assert " --mode knative " in said
