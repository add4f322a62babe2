"""What single values of charts/nvila-platform do, and which are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from tests.charts.conftest import Document, Helm

    Render = Callable[..., list[Document]]

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "nvila-platform"
MATRIX: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "platform_matrix.yaml").read_text("utf-8"))
APIS = ("kubeflow.org/v1alpha1", "pipelines.kubeflow.org/v2beta1", "kueue.x-k8s.io/v1beta2")
API_FLAGS = tuple(word for api in APIS for word in ("--api-versions", api))
GATEWAY_FLAGS = ("--api-versions", "gateway.networking.k8s.io/v1")

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown-key": ({"mlfow": {}}, "additional properties 'mlfow' not allowed"),
    "typo-in-a-section": ({"s3": {"buket": "x"}}, "at '/s3': additional properties 'buket' not allowed"),
    "typo-in-an-image": ({"mlflow": {"image": {"tga": "1"}}}, "at '/mlflow/image': additional properties 'tga'"),
    "typo-in-a-probe": ({"mlflow": {"probes": {"startup": {"period": 1}}}}, "additional properties 'period'"),
    "text-for-a-switch": ({"kueue": {"enabled": "no"}}, "at '/kueue/enabled': got string, want boolean"),
    "both-stores": ({"s3": {"minio": {"enabled": True}}}, "s3.seaweedfs.enabled and s3.minio.enabled are on together"),
    "own-and-external-store": (
        {"s3": {"external": {"enabled": True, "endpoint": "s3.example.com"}}},
        "s3.seaweedfs.enabled and s3.external.enabled are on together",
    ),
    "no-store": ({"s3": {"seaweedfs": {"enabled": False}}}, "no S3 service is on: turn on one of"),
    "external-store-without-address": (
        {"s3": {"seaweedfs": {"enabled": False}, "external": {"enabled": True}}},
        "s3.external.enabled needs s3.external.endpoint",
    ),
    "scheme-in-the-endpoint": ({"s3": {"external": {"endpoint": "https://s3"}}}, "at '/s3/external/endpoint'"),
    "no-s3-secret": (
        {"s3": {"existingSecret": ""}},
        "s3.existingSecret is empty: kubectl -n models create secret generic nvila-s3 --from-literal=access-key=...",
    ),
    "no-database-secret": (
        {"postgres": {"existingSecret": ""}},
        "postgres.existingSecret is empty: kubectl -n models create secret generic nvila-postgres",
    ),
    "both-databases": (
        {"postgres": {"external": {"enabled": True, "host": "db"}}},
        "exactly one of postgres.bundled.enabled and postgres.external.enabled must be on",
    ),
    "no-database": ({"postgres": {"bundled": {"enabled": False}}}, "exactly one of postgres.bundled.enabled"),
    "database-without-host": (
        {"postgres": {"bundled": {"enabled": False}, "external": {"enabled": True}}},
        "postgres.external.enabled needs postgres.external.host",
    ),
    "two-registries": ({"mlflow": {"externalUri": "http://other:5000"}}, "there is one registry"),
    "no-registry": ({"mlflow": {"enabled": False}}, "name the MLflow that pipelines shall use"),
    "no-pods": ({"mlflow": {"replicas": 0}}, "at '/mlflow/replicas': minimum: got 0, want 1"),
    "prefix-as-an-argument": (
        {"mlflow": {"extraArgs": ["--static-prefix", "/mlflow"]}},
        "mlflow.extraArgs has --static-prefix, which probes and clients would not follow: set mlflow.staticPrefix",
    ),
    "port-as-an-argument": ({"mlflow": {"extraArgs": ["--port=80"]}}, "mlflow.extraArgs has --port, which probes"),
    "prefix-without-a-slash": ({"mlflow": {"staticPrefix": "mlflow"}}, "at '/mlflow/staticPrefix'"),
    "prefix-with-one-too-many": ({"mlflow": {"staticPrefix": "/mlflow/"}}, "at '/mlflow/staticPrefix'"),
    "every-origin": ({"mlflow": {"allowedOrigins": ["*"]}}, "at '/mlflow/allowedOrigins/0'"),
    "folder-of-the-node": (
        {"mlflow": {"extraVolumes": [{"name": "x", "hostPath": {"path": "/"}}]}},
        "at '/mlflow/extraVolumes/0': additional properties 'hostPath' not allowed",
    ),
    "privileged-metrics-port": ({"pipelines": {"metricsPort": 80}}, "at '/pipelines/metricsPort'"),
    "moving-tag": ({"mlflow": {"image": {"tag": "latest"}}}, 'mlflow.image.tag "latest" names another image tomorrow'),
    "moving-tag-of-the-store": (
        {"s3": {"seaweedfs": {"image": {"tag": "latest"}}}},
        's3.seaweedfs.image.tag "latest" names another image tomorrow',
    ),
    "root": ({"podSecurityContext": {"runAsUser": 0}}, "at '/podSecurityContext/runAsUser'"),
    "privileged-port": ({"mlflow": {"port": 80}}, "at '/mlflow/port'"),
    "bad-bucket": ({"s3": {"bucket": "My_Bucket"}}, "at '/s3/bucket'"),
    "own-selector-label": ({"commonLabels": {"app.kubernetes.io/name": "x"}}, "/commonLabels/app.kubernetes.io~1name"),
    "name-too-long": ({"fullnameOverride": "e" * 41}, "has 41 characters, at most 40 fit into labels"),
    "uploaded-twice": (
        {"pipelines": {"upload": {"enabled": True}, "resource": {"enabled": True, "pipelineSpec": "a: 1"}}},
        "pipelines.resource.enabled and pipelines.upload.enabled are on together",
    ),
    "resource-without-pipeline": (
        {"pipelines": {"resource": {"enabled": True}}},
        "--set-file pipelines.resource.pipelineSpec=lifecycle.yaml",
    ),
    "resource-of-something-else": (
        {"pipelines": {"resource": {"enabled": True, "pipelineSpec": "a: 1"}}},
        "pipelines.resource.pipelineSpec is no compiled pipeline: it has no schemaVersion",
    ),
    "quota-without-memory": ({"kueue": {"quotas": {"memory": None}}}, "missing property 'memory'"),
}


@pytest.mark.parametrize(("values", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_values_are_refused_by_name(helm: Helm, values: dict[str, Any], said: str) -> None:
    done = helm.template(CHART, values, extra=API_FLAGS)
    assert done.returncode != 0
    assert said in done.stderr


@pytest.mark.parametrize(
    ("values", "key", "api"),
    [
        ({"kueue": {"enabled": True}}, "kueue.enabled", "kueue.x-k8s.io/v1beta1"),
        (MATRIX["pod-default"], "pipelines.podDefault.enabled", "kubeflow.org/v1alpha1"),
        (MATRIX["pipeline-as-a-resource"], "pipelines.resource.enabled", "pipelines.kubeflow.org/v2beta1"),
        (MATRIX["routed-mlflow"], "mlflow.route.enabled", "gateway.networking.k8s.io/v1"),
    ],
)
def test_a_part_without_its_api_is_refused_with_the_way_out(
    helm: Helm, values: dict[str, Any], key: str, api: str
) -> None:
    done = helm.template(CHART, values)
    assert f"{key} needs the API {api}, which this cluster does not have: install it" in done.stderr
    assert helm.template(CHART, values, extra=("--api-versions", api)).returncode == 0


def by_name(documents: list[Document], kind: str, ending: str = "") -> Document:
    return next(d for d in documents if d["kind"] == kind and d["metadata"]["name"].endswith(ending))


def environment(documents: list[Document]) -> dict[str, Any]:
    container = by_name(documents, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in container["env"]}


@pytest.mark.parametrize(
    ("row", "uri", "endpoint", "secure"),
    [
        (
            "defaults",
            "http://demo-nvila-platform-mlflow.models.svc:5000",
            "demo-nvila-platform-s3.models.svc:9000",
            False,
        ),
        ("minio", "http://demo-nvila-platform-mlflow.models.svc:5000", "demo-nvila-platform-s3.models.svc:9001", False),
        ("everything-off", "https://mlflow.example.com", "s3.example.com", True),
        (
            "external-s3-without-tls",
            "http://demo-nvila-platform-mlflow.models.svc:5000",
            "minio.storage.svc:9000",
            False,
        ),
    ],
)
def test_settings_are_what_the_project_reads(
    render: Render, tmp_path: Path, row: str, uri: str, endpoint: str, secure: bool
) -> None:
    data = by_name(render(CHART, MATRIX[row]), "ConfigMap")["data"]
    settings = Settings.load(tmp_path, environ=data)
    assert settings.tracking_uri == uri
    assert settings.s3_endpoint == endpoint
    assert settings.s3_secure is secure
    assert settings.store_uri == "s3://nvila/artifacts"
    assert settings.log_format == "json"
    assert settings.metrics_address == "0.0.0.0:9464"
    # Every variable counts: none is misspelt.
    assert data.keys() <= settings.to_env().keys()


def test_the_example_profile_takes_every_setting_of_the_chart(render: Render) -> None:
    profile = yaml.safe_load((ROOT / "examples" / "kind-profile.yaml").read_text(encoding="utf-8"))
    data = by_name(render(CHART), "ConfigMap")["data"]
    assert profile["defaults"]["config_maps"]["nvila-platform-settings"] == {name: name for name in data}


def test_mlflow_reaches_the_database_and_the_bucket(render: Render) -> None:
    own = environment(render(CHART))
    assert own["MLFLOW_BACKEND_STORE_URI"] == (
        "postgresql+psycopg2://mlflow@demo-nvila-platform-postgres.models.svc:5432/mlflow"
    )
    assert own["PGPASSWORD"] == {"secretKeyRef": {"name": "nvila-postgres", "key": "password"}}
    assert own["MLFLOW_S3_ENDPOINT_URL"] == "http://demo-nvila-platform-s3.models.svc:9000"
    other = environment(render(CHART, MATRIX["external-postgres"]))
    assert other["MLFLOW_BACKEND_STORE_URI"] == "postgresql+psycopg2://vision@db.example.com:6432/tracking"
    assert other["PGPASSWORD"] == {"secretKeyRef": {"name": "team-db", "key": "pw"}}
    assert other["PGSSLMODE"] == "verify-full"
    aws = environment(render(CHART, MATRIX["external-s3"]))
    assert (aws["MLFLOW_S3_ENDPOINT_URL"], aws["AWS_DEFAULT_REGION"]) == (
        "https://s3.eu-central-1.amazonaws.com",
        "eu-central-1",
    )
    keys = environment(render(CHART, MATRIX["own-secrets"]))
    assert keys["AWS_SECRET_ACCESS_KEY"] == {
        "secretKeyRef": {"name": "bucket.credentials", "key": "AWS_SECRET_ACCESS_KEY"}
    }


@pytest.mark.parametrize(
    ("host", "admitted"),
    [
        ("demo-nvila-platform-mlflow:5500", True),
        ("demo-nvila-platform-mlflow.models.svc:5500", True),
        ("demo-nvila-platform-mlflow.models.svc.cluster.local:5500", True),
        ("mlflow.example.com", True),
        # Forwarded ports are any, and Prometheus asks pods by their addresses.
        ("localhost", True),
        ("localhost:38211", True),
        ("127.0.0.1:38211", True),
        ("10.1.2.3:5500", True),
        ("192.168.1.2:5500", True),
        ("172.16.0.9:5500", True),
        ("172.31.255.1:5500", True),
        # What a name server outside may lead here.
        ("172.15.0.9:5500", False),
        ("172.32.0.9:5500", False),
        ("localhost.example.com:5500", False),
        ("mlflow.example.org", False),
        ("8.8.8.8:5500", False),
    ],
)
def test_mlflow_answers_to_its_service_a_gateway_and_forwarded_ports(render: Render, host: str, admitted: bool) -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    hosts = environment(render(CHART, MATRIX["large-mlflow"]))["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert is_allowed_host_header(hosts, host) is admitted


@pytest.mark.parametrize(
    ("values", "origin", "blocked"),
    [
        # Browsers name the origin of a page with every POST, to its own host too.
        ({"allowedHosts": ["mlflow.example.com"]}, "https://mlflow.example.com", False),
        ({"allowedHosts": ["mlflow.example.com:8443"]}, "https://mlflow.example.com:8443", False),
        ({"allowedHosts": ["mlflow.example.com"]}, "http://mlflow.example.com", True),
        ({"allowedHosts": ["mlflow.example.com"]}, "https://example.org", True),
        (
            {"allowedHosts": ["mlflow.example.com"], "allowedOrigins": ["http://mlflow.example.com"]},
            "http://mlflow.example.com",
            False,
        ),
        ({"allowedOrigins": ["https://portal.example.com"]}, "https://portal.example.com", False),
        ({}, "https://mlflow.example.com", True),
        ({}, "http://127.0.0.1:38211", False),
    ],
)
def test_pages_of_mlflow_behind_a_gateway_may_change_something(
    render: Render, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], origin: str, blocked: bool
) -> None:
    from mlflow.server.security_utils import get_allowed_origins_from_env, should_block_cors_request

    name = "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"
    rendered = environment(render(CHART, {"mlflow": values}))
    monkeypatch.delenv(name, raising=False)
    if name in rendered:
        monkeypatch.setenv(name, rendered[name])
    assert should_block_cors_request(origin, "POST", get_allowed_origins_from_env()) is blocked


def test_a_path_of_its_own_is_followed_by_everybody_who_asks_mlflow(render: Render) -> None:
    documents = render(CHART, MATRIX["large-mlflow"])
    (container,) = by_name(documents, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["args"][container["args"].index("--static-prefix") + 1] == "/mlflow"
    probes = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    assert probes == ["/mlflow/health"] * 3
    uri = "http://demo-nvila-platform-mlflow.models.svc:5500/mlflow"
    assert by_name(documents, "ConfigMap")["data"]["NVILA_TRACKING_URI"] == uri
    test = by_name(documents, "Pod")["spec"]["containers"][0]["env"]
    assert {"name": "MLFLOW_URI", "value": uri} in test
    route = {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["mlflow.example.com"]}
    mlflow = {"staticPrefix": "/mlflow", "allowedHosts": route["hostnames"], "route": route}
    routed = render(CHART, {"mlflow": mlflow}, extra=("--api-versions", "gateway.networking.k8s.io/v1"))
    (rule,) = by_name(routed, "HTTPRoute")["spec"]["rules"]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/mlflow"}}]
    plain = by_name(render(CHART), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert plain["startupProbe"]["httpGet"]["path"] == "/health"
    assert "--static-prefix" not in plain["args"]


def test_mlflow_has_the_pods_and_processes_that_were_asked_for(render: Render) -> None:
    documents = render(CHART, MATRIX["large-mlflow"])
    (port,) = by_name(documents, "Service", "-mlflow")["spec"]["ports"]
    assert port["port"] == 5500
    deployment = by_name(documents, "Deployment")["spec"]
    assert deployment["replicas"] == 3
    assert deployment["template"]["spec"]["containers"][0]["args"][-1] == "--uvicorn-opts=--timeout-keep-alive=75"
    arguments = deployment["template"]["spec"]["containers"][0]["args"]
    assert arguments[arguments.index("--workers") + 1] == "8"
    assert arguments[arguments.index("--artifacts-destination") + 1] == "s3://nvila/tracking/artifacts"


@pytest.mark.parametrize(
    ("row", "made"),
    [
        ("defaults", {"mlflow", "postgres", "s3"}),
        ("foreign-mlflow", {"s3"}),
        ("external-postgres", {"mlflow", "s3"}),
        ("all-external", {"mlflow"}),
        ("everything-off", set()),
    ],
)
def test_a_part_that_is_off_leaves_nothing(render: Render, row: str, made: set[str]) -> None:
    documents = render(CHART, MATRIX[row])
    running = {
        d["metadata"]["name"].rpartition("-")[2] for d in documents if d["kind"] in {"Deployment", "StatefulSet"}
    }
    services = {d["metadata"]["name"].rpartition("-")[2] for d in documents if d["kind"] == "Service"}
    assert running == services == made
    if row == "everything-off":
        assert {d["kind"] for d in documents} == {"ConfigMap"}


TRAINING = ("trainjobs", "pods", "pods/log", "events")
DEPLOYING = ("inferenceservices", "servingruntimes", "leases", "httproutes")


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        ("defaults", {"models": (*TRAINING, *DEPLOYING)}),
        ("pipelines-elsewhere", {"kubeflow-user": TRAINING, "serving": DEPLOYING}),
    ],
)
def test_pipelines_get_the_rights_they_need_where_they_need_them(
    render: Render, row: str, roles: dict[str, tuple[str, ...]]
) -> None:
    documents = render(CHART, MATRIX[row])
    granted: dict[str, set[str]] = {}
    for document in (d for d in documents if d["kind"] == "Role"):
        for rule in document["rules"]:
            granted.setdefault(document["metadata"]["namespace"], set()).update(rule["resources"])
    assert granted == {namespace: set(resources) for namespace, resources in roles.items()}
    account = "default-editor" if row == "pipelines-elsewhere" else "pipeline-runner"
    namespace = "kubeflow-user" if row == "pipelines-elsewhere" else "models"
    for document in (d for d in documents if d["kind"] == "RoleBinding"):
        assert document["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": namespace}]
        assert by_name(documents, "Role", document["roleRef"]["name"])


@pytest.mark.parametrize(
    ("extra", "version"),
    [(("--api-versions", "kueue.x-k8s.io/v1beta1"), "v1beta1"), (API_FLAGS, "v1beta2")],
)
def test_queue(render: Render, extra: tuple[str, ...], version: str) -> None:
    documents = render(CHART, MATRIX["queue-of-gpus"], extra=extra)
    flavor, queue = by_name(documents, "ResourceFlavor"), by_name(documents, "ClusterQueue")
    local = by_name(documents, "LocalQueue")
    assert flavor["apiVersion"] == queue["apiVersion"] == local["apiVersion"] == f"kueue.x-k8s.io/{version}"
    assert flavor["spec"] == {"nodeLabels": {"nvidia.com/gpu.present": "true"}}
    (group,) = queue["spec"]["resourceGroups"]
    (offered,) = group["flavors"]
    assert offered["name"] == flavor["metadata"]["name"]
    assert [resource["name"] for resource in offered["resources"]] == group["coveredResources"]
    assert {r["name"]: r["nominalQuota"] for r in offered["resources"]}["nvidia.com/gpu"] == 8
    assert local["spec"] == {"clusterQueue": queue["metadata"]["name"]}
    assert local["metadata"]["name"] == "training"


def test_queue_of_others_is_used(render: Render) -> None:
    documents = render(CHART, MATRIX["queue-of-others"], extra=API_FLAGS)
    assert by_name(documents, "LocalQueue")["spec"] == {"clusterQueue": "team-vision"}
    assert not {"ClusterQueue", "ResourceFlavor"} & {document["kind"] for document in documents}


def test_a_route_leads_from_the_gateway_to_mlflow(render: Render) -> None:
    documents = render(CHART, MATRIX["routed-mlflow"], extra=GATEWAY_FLAGS)
    spec = by_name(documents, "HTTPRoute")["spec"]
    assert spec["parentRefs"] == MATRIX["routed-mlflow"]["mlflow"]["route"]["parentRefs"]
    assert spec["hostnames"] == ["mlflow.example.com"]
    (rule,) = spec["rules"]
    service = by_name(documents, "Service", "-mlflow")
    assert rule["backendRefs"] == [{"name": service["metadata"]["name"], "port": service["spec"]["ports"][0]["port"]}]
    assert rule["timeouts"] == {"request": "10m"}


ROUTE = {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["mlflow.example.com"]}


@pytest.mark.parametrize(
    ("mlflow", "said"),
    [
        ({"route": ROUTE}, 'has "mlflow.example.com", to which MLflow would answer 403: add it to mlflow.allowedHosts'),
        ({"route": ROUTE, "allowedHosts": ["mlflowXexample.com", "*.example.org"]}, "to which MLflow would answer 403"),
        ({"route": ROUTE | {"parentRefs": []}, "allowedHosts": ["*"]}, "needs a gateway to hang on"),
        ({"route": ROUTE | {"hostnames": []}, "allowedHosts": ["*"]}, "needs mlflow.route.hostnames"),
        (
            {"route": ROUTE, "enabled": False, "externalUri": "http://m:5000"},
            "mlflow.route.enabled needs mlflow.enabled",
        ),
        ({"route": {"host": "x"}}, "additional properties 'host' not allowed"),
        ({"route": {"hostnames": ["https://x"]}}, "at '/mlflow/route/hostnames/0'"),
    ],
)
def test_a_route_that_leads_nowhere_is_refused(helm: Helm, mlflow: dict[str, Any], said: str) -> None:
    done = helm.template(CHART, {"mlflow": mlflow}, extra=GATEWAY_FLAGS)
    assert done.returncode != 0
    assert said in done.stderr


def test_pod_default_brings_settings_and_credentials_to_every_task(render: Render) -> None:
    documents = render(CHART, MATRIX["pod-default"], extra=API_FLAGS)
    spec = by_name(documents, "PodDefault")["spec"]
    assert spec["envFrom"] == [{"configMapRef": {"name": by_name(documents, "ConfigMap")["metadata"]["name"]}}]
    assert [item["name"] for item in spec["env"]] == ["NVILA_S3_ACCESS_KEY", "NVILA_S3_SECRET_KEY"]
    assert spec["selector"] == {"matchExpressions": [{"key": "pipeline/runid", "operator": "Exists"}]}


def test_the_projects_pipeline_as_a_resource(helm: Helm, crds: Any) -> None:
    compiled = ROOT / "pipelines" / "nvila_pipelines" / "graphs" / "compiled" / "lifecycle.yaml"
    values = {"pipelines": {"resource": {"enabled": True}}}
    extra = (*API_FLAGS, "--set-file", f"pipelines.resource.pipelineSpec={compiled}")
    done = helm.template(CHART, values, extra=extra)
    assert done.returncode == 0, done.stderr
    documents = [document for document in yaml.safe_load_all(done.stdout) if document]
    version, pipeline = by_name(documents, "PipelineVersion"), by_name(documents, "Pipeline", "nvila-lifecycle")
    assert crds.errors(version) == crds.errors(pipeline) == []
    assert version["spec"]["pipelineSpec"] == yaml.safe_load(compiled.read_text(encoding="utf-8"))
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"]


@pytest.mark.parametrize(
    ("row", "component", "ports"),
    [
        ("defaults", "mlflow", [[53, 53], [9000], [5432]]),
        ("defaults", "s3", []),
        ("defaults", "postgres", []),
        ("defaults", "bucket", [[53, 53], [9000]]),
        ("all-external", "mlflow", [[53, 53], [8443], [5432], []]),
        ("upload", "upload", [[53, 53], [8888]]),
        ("upload-with-token", "upload", [[53, 53], [443]]),
    ],
)
def test_what_each_part_may_reach(render: Render, row: str, component: str, ports: list[list[int]]) -> None:
    spec = by_name(render(CHART, MATRIX[row]), "NetworkPolicy", f"-{component}")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert [[port["port"] for port in rule.get("ports", [])] for rule in spec["egress"]] == ports


@pytest.mark.parametrize(
    ("values", "mlflow", "s3"),
    [
        ({}, {"kubeflow", "monitoring"}, {"kubeflow", "monitoring"}),
        (
            MATRIX["pipelines-elsewhere"],
            {"kubeflow", "monitoring", "kubeflow-user", "serving"},
            {"kubeflow", "monitoring", "kubeflow-user", "serving"},
        ),
        (
            {"pipelines": {"namespace": "kubeflow", "rbac": {"servingNamespace": "models"}}},
            {"kubeflow", "monitoring"},
            {"kubeflow", "monitoring"},
        ),
        (MATRIX["closed-network"], set(), set()),
        # Gateways have MLflow behind them, and not the bucket.
        (MATRIX["behind-a-gateway"], {"team", "istio-system"}, {"team"}),
    ],
    ids=["defaults", "pipelines-elsewhere", "each-once", "closed", "behind-a-gateway"],
)
def test_namespaces_of_pipelines_endpoints_and_gateways_are_let_in(
    render: Render, values: dict[str, Any], mlflow: set[str], s3: set[str]
) -> None:
    documents = render(CHART, values)
    for component, names in {"mlflow": mlflow, "s3": s3}.items():
        (rule,) = by_name(documents, "NetworkPolicy", f"-{component}")["spec"]["ingress"]
        own, *others = rule["from"]
        assert own == {"podSelector": {}}
        found = [name for peer in others for name in peer["namespaceSelector"]["matchExpressions"][0]["values"]]
        assert sorted(found) == sorted(names)
        assert len(others) == bool(names)


def test_the_database_is_reached_by_mlflow_alone(render: Render) -> None:
    (rule,) = by_name(render(CHART), "NetworkPolicy", "-postgres")["spec"]["ingress"]
    (peer,) = rule["from"]
    assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "mlflow"


def test_external_services_are_reached_at_their_addresses_only(render: Render) -> None:
    spec = by_name(render(CHART, MATRIX["all-external"]), "NetworkPolicy", "-mlflow")["spec"]
    assert [rule.get("to") for rule in spec["egress"][1:3]] == [[{"ipBlock": {"cidr": "10.0.0.0/8"}}]] * 2


def test_volumes(render: Render) -> None:
    documents = render(CHART, MATRIX["minio"])
    (claim,) = by_name(documents, "StatefulSet", "-s3")["spec"]["volumeClaimTemplates"]
    assert claim["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "fast",
        "resources": {"requests": {"storage": "1Ti"}},
    }


def test_notes_give_the_next_three_commands(helm: Helm) -> None:
    for row, first in (
        ("defaults", "rollout status deployment/demo-nvila-platform-mlflow"),
        ("foreign-mlflow", "get configmap"),
    ):
        done = helm.run(
            "install", "demo", CHART, "--namespace", "models", "--dry-run=client", "--values", "-",
            stdin=yaml.safe_dump(MATRIX[row]),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        _, _, notes = done.stdout.partition("NOTES:")
        commands = [line.strip() for line in notes.splitlines() if line.startswith("     ")]
        assert len(commands) == 3
        assert first in commands[0]
        assert commands[2] == "helm test demo -n models"
        assert "which must exist in namespace models" in notes


def test_what_others_publish_runs_by_digest_unless_it_is_ones_own_choice(render: Render) -> None:
    def images(**values: Any) -> set[str]:
        return {
            container["image"]
            for document in render(CHART, values)
            if document["kind"] == "StatefulSet"
            for container in document["spec"]["template"]["spec"]["containers"]
        }

    pinned = yaml.safe_load((CHART / "files" / "image-digests.yaml").read_text(encoding="utf-8"))
    minio = {"seaweedfs": {"enabled": False}, "minio": {"enabled": True}}
    assert images() | images(s3=minio) == {f"{name}@{digest}" for name, digest in pinned.items()}
    assert "docker.io/library/postgres:18.0" in images(postgres={"bundled": {"image": {"tag": "18.0"}}})
    # The project's registry has none of them; a mirror has the same bytes, so the digest stays.
    assert images(**{"global": {"imageRegistry": "registry.example.com"}}) == images()
    mirrored = images(
        postgres={"bundled": {"image": {"registry": "mirror.example.com"}}},
        s3={"seaweedfs": {"image": {"registry": "mirror.example.com:5000/hub"}}},
    )
    assert mirrored == {
        f"{registry}/{name.partition('/')[2]}@{digest}"
        for name, digest in pinned.items()
        for part, registry in (("postgres", "mirror.example.com"), ("seaweedfs", "mirror.example.com:5000/hub"))
        if part in name
    }
