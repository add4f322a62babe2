"""What charts/nvila-serving renders, by the real helm, over a matrix of values."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from tests.charts.built_in_validation import BuiltInSchemas
    from tests.charts.conftest import Document
    from tests.charts.crd_validation import CrdSchemas

    Render = Callable[..., list[Document]]

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "nvila-serving"
APIS = ("--api-versions", "keda.sh/v1alpha1", "--api-versions", "gateway.networking.k8s.io/v1")
DIGEST = "sha256:" + "0a" * 32
SECRET_NAME = re.compile(r"(KEY|SECRET|PASSWORD|TOKEN|CREDENTIALS?)($|_)")
KSERVE_KINDS = {"InferenceService", "ServingRuntime"}
GATEWAY_KINDS = {"HTTPRoute"}
BUILT_IN_KINDS = {"NetworkPolicy", "PodDisruptionBudget", "ServiceAccount", "Pod"}

MATRIX: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "serving_matrix.yaml").read_text("utf-8"))
each_row = pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())


def by_kind(documents: list[Document], kind: str) -> Document:
    return next(document for document in documents if document["kind"] == kind)


def serving_pod(documents: list[Document]) -> Document:
    """Return the pod that KServe makes of the two resources, as far as the chart decides it."""
    runtime = by_kind(documents, "ServingRuntime")["spec"]
    service = by_kind(documents, "InferenceService")
    own = {"model", "minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "autoScaling", "annotations", "labels"}
    predictor = {key: value for key, value in service["spec"]["predictor"].items() if key not in own}
    labels = {
        **service["metadata"]["labels"],
        **service["spec"]["predictor"].get("labels", {}),
        "app": f"isvc.{service['metadata']['name']}-predictor",
        "component": "predictor",
        "serving.kserve.io/inferenceservice": service["metadata"]["name"],
    }
    pulls = {key: runtime[key] for key in ("imagePullSecrets",) if key in runtime}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "serving", "labels": labels},
        "spec": {**predictor, **pulls, "containers": runtime["containers"], "volumes": runtime["volumes"]},
    }


def all_pods(documents: list[Document]) -> list[Document]:
    return [serving_pod(documents), *(document for document in documents if document["kind"] == "Pod")]


def container_of(documents: list[Document]) -> Document:
    container: Document = by_kind(documents, "ServingRuntime")["spec"]["containers"][0]
    return container


# ----------------------------------------------------------------------------------------------------------------------
# Everything that renders is valid


@each_row
def test_built_in_resources_are_valid_for_old_and_new_kubernetes(
    render: Render, built_in: BuiltInSchemas, values: dict[str, Any]
) -> None:
    documents = render(CHART, values, extra=APIS)
    found = [document for document in documents if document["kind"] in BUILT_IN_KINDS]
    others = [document for document in documents if document["kind"] in KSERVE_KINDS | GATEWAY_KINDS]
    assert len(found) + len(others) == len(documents)
    for document in found:
        assert built_in.errors(document) == []


@each_row
def test_the_pod_that_kserve_makes_of_the_chart_is_valid(
    render: Render, built_in: BuiltInSchemas, values: dict[str, Any]
) -> None:
    # The definitions below describe a pod too, but only built-in validation knows all of its rules.
    assert built_in.errors(serving_pod(render(CHART, values, extra=APIS))) == []


@each_row
def test_resources_of_others_match_their_definitions(render: Render, crds: CrdSchemas, values: dict[str, Any]) -> None:
    documents = [document for document in render(CHART, values, extra=APIS) if document["kind"] not in BUILT_IN_KINDS]
    assert {document["kind"] for document in documents} - GATEWAY_KINDS == KSERVE_KINDS
    assert ("HTTPRoute" in {document["kind"] for document in documents}) == ("route" in values)
    for document in documents:
        assert crds.errors(document) == []


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("InferenceService", {"minReplica": 1}, "'minReplica' was unexpected"),
        ("InferenceService", {"maxReplicas": "four"}, "maxReplicas: 'four' is not of type 'integer'"),
        ("InferenceService", {"scaleMetric": "gpu"}, "scaleMetric: 'gpu' is not one of"),
        ("ServingRuntime", {"container": []}, "'container' was unexpected"),
        ("ServingRuntime", {"containers": [{"image": "x"}]}, "'name' is a required property"),
        ("HTTPRoute", {"hostname": "eyes.example.com"}, "'hostname' was unexpected"),
        ("HTTPRoute", {"rules": [{"timeouts": {"request": "1 minute"}}]}, "'1 minute' does not match"),
        ("HTTPRoute", {"rules": [{"backendRefs": [{"port": 80}]}]}, "'name' is a required property"),
    ],
)
def test_validation_itself_finds_mistakes(
    render: Render, crds: CrdSchemas, kind: str, change: dict[str, Any], said: str
) -> None:
    document = json.loads(json.dumps(by_kind(render(CHART, MATRIX["behind-a-gateway"], extra=APIS), kind)))
    spec = document["spec"]
    (spec["predictor"] if kind == "InferenceService" else spec).update(change)
    assert any(said in error for error in crds.errors(document)), crds.errors(document)


def test_validation_of_built_in_resources_finds_mistakes(render: Render, built_in: BuiltInSchemas) -> None:
    budget = by_kind(render(CHART), "PodDisruptionBudget")
    misspelt = {**budget, "spec": {**budget["spec"], "maxUnavailabel": 1}}
    assert any("maxUnavailabel" in error for error in built_in.errors(misspelt))
    with pytest.raises(FileNotFoundError):
        built_in.errors({"apiVersion": "v1", "kind": "Eye"})


def test_validation_does_not_pass_a_kind_that_it_does_not_know(crds: CrdSchemas) -> None:
    with pytest.raises(LookupError, match="no definition of example"):
        crds.errors({"apiVersion": "example.com/v1", "kind": "Eye"})


# ----------------------------------------------------------------------------------------------------------------------
# Policy


@each_row
def test_containers_are_locked_down(render: Render, values: dict[str, Any]) -> None:
    for pod in all_pods(render(CHART, values, extra=APIS)):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        # A Service named like a setting of the server would become one.
        assert spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        for volume in spec.get("volumes", []):
            assert volume.keys() <= {"name", "emptyDir", "secret", "configMap"}
            # A volume in memory or on the node's disk without a limit takes the node down.
            assert volume.get("emptyDir", {"sizeLimit": "-"})["sizeLimit"]
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            }
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
            assert re.search(r"(:[^:/@]+|@sha256:[0-9a-f]{64})$", container["image"]), container["image"]
            assert not container["image"].endswith(":latest")
            for variable in container.get("env", []):
                if SECRET_NAME.search(variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"], variable["name"]


@each_row
def test_server_is_probed_on_its_own_port(render: Render, values: dict[str, Any]) -> None:
    container = container_of(render(CHART, values, extra=APIS))
    port = container["ports"][0]["containerPort"]
    for probe, path in {
        "startupProbe": "/v2/health/ready",
        "readinessProbe": "/v2/health/ready",
        "livenessProbe": "/v2/health/live",
    }.items():
        assert container[probe]["httpGet"] == {"path": path, "port": port}
        assert container[probe].keys() == {"httpGet", "periodSeconds", "timeoutSeconds", "failureThreshold"}
    assert container["args"][container["args"].index("--port") + 1] == str(port)


@each_row
def test_every_resource_is_labelled_and_named_within_the_limits(render: Render, values: dict[str, Any]) -> None:
    for document in render(CHART, values, extra=APIS):
        metadata = document["metadata"]
        assert metadata["namespace"] == "models"
        assert metadata["labels"]["app.kubernetes.io/instance"] == "demo"
        assert metadata["labels"]["app.kubernetes.io/managed-by"] == "Helm"
        assert len(metadata["name"]) <= 63
        # KServe labels pods with this.
        if document["kind"] == "InferenceService":
            assert len(f"isvc.{metadata['name']}-predictor") <= 63


@each_row
def test_selectors_find_the_pods_that_kserve_makes(render: Render, values: dict[str, Any]) -> None:
    documents = render(CHART, values, extra=APIS)
    pod = serving_pod(documents)
    selectors = [
        document["spec"][key]["matchLabels"]
        for kind, key in (("NetworkPolicy", "podSelector"), ("PodDisruptionBudget", "selector"))
        for document in documents
        if document["kind"] == kind
    ]
    selectors += [
        constraint["labelSelector"]["matchLabels"]
        for constraint in pod["spec"]["topologySpreadConstraints"]
        if "labelSelector" in constraint
    ]
    for selector in selectors:
        assert selector.items() <= pod["metadata"]["labels"].items()
        # The test pod shares the release's labels; it must be neither isolated nor counted.
        assert "serving.kserve.io/inferenceservice" in selector


def test_an_upgrade_of_the_chart_alone_restarts_no_pod(render: Render) -> None:
    labels = by_kind(render(CHART), "InferenceService")["metadata"]["labels"]
    assert not {"helm.sh/chart", "app.kubernetes.io/version"} & labels.keys()


def test_budget_has_a_name_that_kserve_leaves_alone(render: Render) -> None:
    documents = render(CHART)
    service = by_kind(documents, "InferenceService")["metadata"]["name"]
    assert by_kind(documents, "PodDisruptionBudget")["metadata"]["name"] != f"{service}-predictor"


# ----------------------------------------------------------------------------------------------------------------------
# What single values do


def test_server_gets_the_command_line_of_the_image(render: Render) -> None:
    container = container_of(render(CHART, MATRIX["server"]))
    assert container["name"] == "kserve-container"
    assert container["command"] == ["nvila"]
    model, address, name = ["--model-dir", "/mnt/models"], ["--host", "0.0.0.0"], ["--name", "{{.Name}}"]
    assert container["args"] == ["serve", *model, *address, "--port", "9090", *name, "--max-requests", "8"]


def test_every_flag_of_the_chart_is_one_of_the_command(render: Render) -> None:
    if not (ROOT / "pipelines" / "nvila_pipelines" / "cli" / "serve.py").exists():
        pytest.skip("this checkout has no serve verb")
    program = "import sys; from nvila_pipelines.cli import main; sys.exit(main(['serve', '--help']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    flags = {word for word in container_of(render(CHART))["args"] if word.startswith("--")}
    assert flags == {"--model-dir", "--host", "--port", "--name"}
    for row in ("closed", "behind-a-proxy", "media", "drift"):
        flags |= {word for word in container_of(render(CHART, MATRIX[row]))["args"] if word.startswith("--")}
    assert len(flags) == 13
    assert all(re.search(rf"{flag}\b", done.stdout) for flag in flags), done.stdout


@pytest.mark.parametrize(
    ("row", "arguments"),
    [
        ("closed", ["--api-keys", "/etc/nvila/access/keys", "--rate-limit", "60", "--production"]),
        ("behind-a-proxy", ["--trusted-header", "x-forwarded-user", "--production"]),
        (
            "media",
            [
                "--media-host",
                "images.example.com",
                "--media-network",
                "10.1.0.0/16",
                "--media-store",
                "s3://nvila/media",
            ],
        ),
        ("drift", ["--drift", "/etc/nvila/drift/drift.json", "--drift-share", "0.5"]),
    ],
)
def test_values_become_arguments_that_the_server_takes(render: Render, row: str, arguments: list[str]) -> None:
    from nvila_platform.serving.options import add_arguments, options_of

    container = container_of(render(CHART, MATRIX[row]))
    assert container["args"][9:] == arguments
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parsed = parser.parse_args(arguments)
    # Files are of the pod; that they are read is the server's own test.
    parsed.drift = None
    if parsed.api_keys is None:
        options_of(parsed)
    assert parsed.production is (row in {"closed", "behind-a-proxy"})


@pytest.mark.parametrize(
    ("row", "kind", "name", "path"),
    [
        ("closed", "secret", "nvila-api-keys", "/etc/nvila/access"),
        ("drift", "configMap", "nvila-drift", "/etc/nvila/drift"),
    ],
)
def test_files_of_the_user_are_mounted_where_the_server_reads_them(
    render: Render, row: str, kind: str, name: str, path: str
) -> None:
    runtime = next(d for d in render(CHART, MATRIX[row]) if d["kind"] == "ServingRuntime")
    (volume,) = (one for one in runtime["spec"]["volumes"] if kind in one)
    assert volume[kind].get("secretName", volume[kind].get("name")) == name
    mounts = {one["name"]: one for one in runtime["spec"]["containers"][0]["volumeMounts"]}
    assert (mounts[volume["name"]]["mountPath"], mounts[volume["name"]]["readOnly"]) == (path, True)


def test_a_route_leads_from_the_gateway_to_the_service_that_kserve_makes(render: Render) -> None:
    gateway = {"name": "public", "namespace": "envoy-gateway-system"}
    values = {"route": {"enabled": True, "parentRefs": [gateway], "hostnames": ["eyes.example.com"]}}
    documents = render(CHART, values, extra=("--api-versions", "gateway.networking.k8s.io/v1"))
    service = next(d for d in documents if d["kind"] == "InferenceService")
    (route,) = (d["spec"] for d in documents if d["kind"] == "HTTPRoute")
    assert route["parentRefs"] == [gateway]
    assert route["hostnames"] == ["eyes.example.com"]
    (rule,) = route["rules"]
    assert rule["backendRefs"] == [{"name": f"{service['metadata']['name']}-predictor", "port": 80}]
    assert rule["timeouts"] == {"request": "0s"}


@pytest.mark.parametrize(
    ("row", "image"),
    [
        ("defaults", "nvila/serve:0.1.0"),
        ("by-tag", "team/nvila-serve:1.2.3"),
        ("by-digest", f"registry.example.com:5000/nvila/serve@{DIGEST}"),
        ("umbrella", "mirror.example.com/nvila/serve:0.1.0"),
        ("without-cuda", "nvila/serve:0.1.0-cpu"),
    ],
)
def test_image_reference(render: Render, row: str, image: str) -> None:
    assert {c["image"] for pod in all_pods(render(CHART, MATRIX[row])) for c in pod["spec"]["containers"]} == {image}


def test_default_tag_is_the_version_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    source = (ROOT / "model" / "nvila" / "_version.py").read_text(encoding="utf-8")
    assert f'"{chart["appVersion"]}"' in source


def test_pull_secrets_reach_every_place_once(render: Render) -> None:
    documents = render(CHART, MATRIX["pull-secrets"])
    expected = [{"name": "shared"}, {"name": "own"}]
    assert by_kind(documents, "ServingRuntime")["spec"]["imagePullSecrets"] == expected
    assert by_kind(documents, "ServiceAccount")["imagePullSecrets"] == expected
    assert by_kind(documents, "Pod")["spec"]["imagePullSecrets"] == expected


@pytest.mark.parametrize(
    ("row", "scaling", "predictor"),
    [
        ("defaults", "hpa", {"minReplicas": 1, "maxReplicas": 4, "scaleMetric": "cpu", "scaleTarget": 80}),
        ("memory-scaling", "hpa", {"minReplicas": 2, "maxReplicas": 2, "scaleMetric": "memory", "scaleTarget": 70}),
        ("everything-off", "none", {"minReplicas": 3, "maxReplicas": 3}),
    ],
)
def test_autoscaling_uses_the_fields_of_the_inference_service(
    render: Render, row: str, scaling: str, predictor: dict[str, Any]
) -> None:
    service = by_kind(render(CHART, MATRIX[row]), "InferenceService")
    annotations = service["metadata"]["annotations"]
    assert annotations["serving.kserve.io/deploymentMode"] == "Standard"
    assert annotations["serving.kserve.io/autoscalerClass"] == scaling
    keys = ("minReplicas", "maxReplicas", "scaleMetric", "scaleTarget")
    assert {key: service["spec"]["predictor"][key] for key in keys if key in service["spec"]["predictor"]} == predictor


@pytest.mark.parametrize(
    ("row", "made", "used"),
    [
        ("defaults", "demo-nvila-serving", "demo-nvila-serving"),
        ("named-account", "nvila-eyes", "nvila-eyes"),
        ("foreign-account", None, "team-serving"),
        ("everything-off", None, "default"),
    ],
)
def test_service_account(render: Render, row: str, made: str | None, used: str) -> None:
    documents = render(CHART, MATRIX[row])
    accounts = [document["metadata"]["name"] for document in documents if document["kind"] == "ServiceAccount"]
    assert accounts == ([made] if made else [])
    assert by_kind(documents, "InferenceService")["spec"]["predictor"]["serviceAccountName"] == used


@pytest.mark.parametrize(
    ("row", "replicas", "query", "target"),
    [
        (
            "keda",
            (1, 4),
            'avg_over_time(sum(nvila:num_requests_running{namespace="models",model_name="demo-nvila-serving"}'
            ' + nvila:num_requests_waiting{namespace="models",model_name="demo-nvila-serving"})[2m:15s])',
            "4",
        ),
        ("keda-to-zero", (0, 4), 'sum(rate(gateway_requests_total{route="eyes"}[1m]))', "10"),
    ],
)
def test_keda_scales_by_what_prometheus_sees(
    render: Render, row: str, replicas: tuple[int, int], query: str, target: str
) -> None:
    service = by_kind(render(CHART, MATRIX[row], extra=APIS), "InferenceService")
    predictor = service["spec"]["predictor"]
    assert service["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "keda"
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == replicas
    assert "scaleMetric" not in predictor
    (metric,) = predictor["autoScaling"]["metrics"]
    assert metric["external"]["metric"]["query"] == query
    assert metric["external"]["metric"]["serverAddress"] == MATRIX[row]["autoscaling"]["keda"]["serverAddress"]
    assert metric["external"]["target"] == {"type": "AverageValue", "value": target, "averageValue": target}


@pytest.mark.parametrize(
    ("row", "query", "target", "window", "percent"),
    [
        ("keda-by-visual-load", 'avg_over_time(sum(nvila:visual_load_tokens{namespace="models",', "8000", 60, 50),
        (
            "keda-by-latency",
            "(histogram_quantile(0.95, sum by (le) (rate(nvila:time_to_first_token_seconds_",
            "0.5",
            300,
            20,
        ),
    ],
)
def test_keda_scales_by_other_measures_and_takes_pods_away_slowly(
    render: Render, row: str, query: str, target: str, window: int, percent: int
) -> None:
    service = by_kind(render(CHART, MATRIX[row], extra=APIS), "InferenceService")
    scaling = service["spec"]["predictor"]["autoScaling"]
    (metric,) = scaling["metrics"]
    assert metric["external"]["metric"]["query"].startswith(query)
    # KEDA divides by the number of pods, which a percentile over all of them must not be.
    count = ' * count(nvila:num_requests_running{namespace="models",model_name="demo-nvila-serving"})'
    assert metric["external"]["metric"]["query"].endswith(count) == (row == "keda-by-latency")
    assert metric["external"]["target"] == {"type": "AverageValue", "value": target, "averageValue": target}
    policy = {"type": "Percent", "value": percent, "periodSeconds": 60}
    assert scaling["behavior"] == {"scaleDown": {"stabilizationWindowSeconds": window, "policies": [policy]}}


def test_model_and_its_credentials(render: Render) -> None:
    documents = render(CHART, MATRIX["s3"])
    model = by_kind(documents, "InferenceService")["spec"]["predictor"]["model"]
    runtime = by_kind(documents, "ServingRuntime")
    (offered,) = runtime["spec"]["supportedModelFormats"]
    assert model["storageUri"] == "s3://nvila/artifacts/quantize/0123"
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"] == {"name": offered["name"], "version": offered["version"]}
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert offered["autoSelect"] is False
    account = by_kind(documents, "ServiceAccount")
    assert account["secrets"] == [{"name": "nvila-storage"}]
    assert account["metadata"]["annotations"] == {"example.com/role": "reader"}


@pytest.mark.parametrize(
    ("row", "sources", "egress_ports"),
    [
        ("defaults", ["test", "same", "kserve,envoy-gateway-system,monitoring"], [[53, 53], [443, 9000]]),
        ("closed-network", ["test", "gateway"], [[53, 53], [8333], []]),
        ("isolated-network", ["test", "same"], [[53, 53]]),
    ],
)
def test_network_policy(render: Render, row: str, sources: list[str], egress_ports: list[list[int]]) -> None:
    spec = by_kind(render(CHART, MATRIX[row]), "NetworkPolicy")["spec"]

    def name(peer: Document) -> str:
        if "namespaceSelector" in peer:
            return ",".join(peer["namespaceSelector"]["matchExpressions"][0]["values"])
        return str(peer["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/component", "same"))

    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert [name(peer) for peer in spec["ingress"][0]["from"]] == sources
    assert [[port["port"] for port in rule.get("ports", [])] for rule in spec["egress"]] == egress_ports


def test_connections_drain_before_the_server_stops(render: Render) -> None:
    documents = render(CHART, MATRIX["server"])
    assert container_of(documents)["lifecycle"] == {"preStop": {"sleep": {"seconds": 10}}}
    assert by_kind(documents, "InferenceService")["spec"]["predictor"]["terminationGracePeriodSeconds"] == 120
    assert "lifecycle" not in container_of(render(CHART, MATRIX["everything-off"]))


def test_labels_and_annotations_of_the_user_are_added(render: Render) -> None:
    documents = render(CHART, MATRIX["labels"])
    assert {document["metadata"]["labels"]["team"] for document in documents} == {"vision"}
    assert by_kind(documents, "InferenceService")["spec"]["predictor"]["annotations"] == {"example.com/cost": "eyes"}


@pytest.mark.parametrize(
    ("release", "values", "name"),
    [
        ("demo", {}, "demo-nvila-serving"),
        ("nvila-serving", {}, "nvila-serving"),
        ("demo", {"nameOverride": "eyes"}, "demo-eyes"),
        ("demo", {"fullnameOverride": "eyes"}, "eyes"),
    ],
)
def test_resource_names(render: Render, release: str, values: dict[str, Any], name: str) -> None:
    assert by_kind(render(CHART, values, release), "InferenceService")["metadata"]["name"] == name


def test_the_default_render(render: Render, golden: Callable[[str, str], None]) -> None:
    text = yaml.safe_dump_all(render(CHART), sort_keys=False, width=120)
    golden("charts/nvila-serving.yaml", re.sub(r"\b0\.1\.0\b", "VERSION", text))
