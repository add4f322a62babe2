"""Values that people expect of any chart: annotations, accounts, places of pods, volumes, certificates, objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from tests.charts.conftest import Document, Helm

    Render = Callable[..., list[Document]]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHARTS = ROOT / "charts"
APIS = (
    "kubeflow.org/v1alpha1",
    "kueue.x-k8s.io/v1beta2",
    "monitoring.coreos.com/v1",
    "gateway.networking.k8s.io/v1",
)
API_FLAGS = tuple(word for api in APIS for word in ("--api-versions", api))
NAMES = ("platform", "serving", "observability")
# Debian's file of authorities, which the base images have.
SYSTEM = "/etc/ssl/certs/ca-certificates.crt"

each_chart = pytest.mark.parametrize("name", NAMES)


def chart(name: str) -> Path:
    return CHARTS / f"nvila-{name}"


def row(name: str, of: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((HERE / f"{of}_matrix.yaml").read_text("utf-8"))[name]
    return found


def rendered(render: Render, name: str, values: dict[str, Any]) -> list[Document]:
    return render(chart(name), values, extra=API_FLAGS)


def pods(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Yield the component and the spec of every pod of charts/nvila-platform."""
    for document in documents:
        if document["kind"] == "Pod":
            yield document["metadata"]["labels"]["app.kubernetes.io/component"], document["spec"]
        elif document["kind"] in {"Deployment", "StatefulSet", "Job"}:
            template = document["spec"]["template"]
            yield template["metadata"]["labels"]["app.kubernetes.io/component"], template["spec"]


def one(documents: list[Document], kind: str) -> Document:
    (found,) = (document for document in documents if document["kind"] == kind)
    return found


def variables(spec: Document) -> dict[str, Any]:
    return {item["name"]: item.get("value") for item in spec["containers"][0].get("env", [])}


# ----------------------------------------------------------------------------------------------------------------------
# Annotations


@each_chart
def test_common_annotations_reach_every_resource_and_no_pod_template(render: Render, name: str) -> None:
    plain = rendered(
        render, name, {key: value for key, value in row("annotations", name).items() if "common" not in key}
    )
    documents = rendered(render, name, row("annotations", name))
    assert {document["metadata"]["annotations"]["example.com/owner"] for document in documents} == {"vision"}
    # Another owner restarts no pod.
    assert [d["spec"].get("template") for d in documents if "spec" in d] == [
        d["spec"].get("template") for d in plain if "spec" in d
    ]
    # What a resource is annotated with anyhow, such as helm's hooks, is still there.
    for annotated, before in zip(documents, plain, strict=True):
        assert before["metadata"].get("annotations", {}).items() <= annotated["metadata"]["annotations"].items()


def test_an_annotation_of_one_resource_wins_over_a_common_one(render: Render) -> None:
    documents = rendered(render, "observability", row("annotations", "observability"))
    folders = {d["kind"]: d["metadata"]["annotations"]["grafana_folder"] for d in documents}
    assert folders == {
        "ConfigMap": "NVILA",
        "PodMonitor": "shared",
        "ServiceMonitor": "shared",
        "PrometheusRule": "shared",
    }


def test_annotations_of_the_endpoint_stand_beside_those_that_kserve_reads(render: Render) -> None:
    service = one(rendered(render, "serving", row("annotations", "serving")), "InferenceService")
    assert service["metadata"]["annotations"] == {
        "serving.kserve.io/deploymentMode": "Standard",
        "serving.kserve.io/autoscalerClass": "hpa",
        "serving.kserve.io/enable-prometheus-scraping": "true",
        "sidecar.istio.io/inject": "false",
        "example.com/owner": "vision",
    }


def test_dashboards_go_where_grafana_looks(render: Render) -> None:
    def places(values: dict[str, Any]) -> set[tuple[str, str]]:
        documents = rendered(render, "observability", values)
        return {(document["kind"], document["metadata"]["namespace"]) for document in documents}

    assert ("ConfigMap", "models") in places({})
    moved = places(row("annotations", "observability"))
    assert ("ConfigMap", "monitoring") in moved
    assert {place for kind, place in moved if kind != "ConfigMap"} == {"models"}


# ----------------------------------------------------------------------------------------------------------------------
# Where pods run, and as whom


def test_parts_run_on_their_own_nodes_and_the_rest_on_those_of_the_chart(render: Render) -> None:
    found = dict(pods(rendered(render, "platform", row("parts-on-their-own-nodes", "platform"))))
    assert {name: spec["nodeSelector"] for name, spec in found.items()} == {
        "mlflow": {"pool": "services"},
        "bucket": {"pool": "services"},
        "test": {"pool": "services"},
        "postgres": {"disk": "nvme"},
        "s3": {"disk": "large"},
    }
    assert {name: spec["tolerations"][0]["key"] for name, spec in found.items()} == {
        **dict.fromkeys(found, "services"),
        "postgres": "databases",
    }
    assert {name for name, spec in found.items() if "affinity" in spec} == {"mlflow"}


def test_pods_of_mlflow_prefer_nodes_of_their_own(render: Render) -> None:
    documents = rendered(render, "platform", {"mlflow": {"replicas": 2}})
    deployment = one(documents, "Deployment")["spec"]
    (spread,) = deployment["template"]["spec"]["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    assert spread["labelSelector"] == deployment["selector"]
    asked = row("parts-on-their-own-nodes", "platform")
    (spread,) = dict(pods(rendered(render, "platform", asked)))["mlflow"]["topologySpreadConstraints"]
    assert spread == asked["mlflow"]["topologySpreadConstraints"][0]


@pytest.mark.parametrize(
    ("name", "made", "used"),
    [
        ("defaults", "demo-nvila-platform", "demo-nvila-platform"),
        ("named-account", "nvila-runs", "nvila-runs"),
        ("foreign-account", None, "team-platform"),
    ],
)
def test_pods_of_the_platform_run_under_its_account(render: Render, name: str, made: str | None, used: str) -> None:
    documents = rendered(render, "platform", row(name, "platform"))
    accounts = [document for document in documents if document["kind"] == "ServiceAccount"]
    assert [account["metadata"]["name"] for account in accounts] == ([made] if made else [])
    assert all(account["automountServiceAccountToken"] is False for account in accounts)
    assert {spec["serviceAccountName"] for _, spec in pods(documents)} == {used}


def test_the_accounts_annotations_are_the_users(render: Render) -> None:
    for name in ("platform", "serving"):
        account = one(rendered(render, name, row("annotations", name)), "ServiceAccount")
        assert account["metadata"]["annotations"] == {
            "eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/nvila",
            "example.com/owner": "vision",
        }


def test_the_test_of_an_endpoint_runs_where_the_endpoint_may(render: Render) -> None:
    values = row("volumes", "serving")
    documents = rendered(render, "serving", {**values, "nodeSelector": {"pool": "gpu"}})
    predictor, test = one(documents, "InferenceService")["spec"]["predictor"], one(documents, "Pod")["spec"]
    for key in ("affinity", "priorityClassName", "nodeSelector"):
        assert test[key] == predictor[key]
    # It needs no GPU, so no runtime of one.
    assert predictor["runtimeClassName"] == "nvidia"
    assert "runtimeClassName" not in test


# ----------------------------------------------------------------------------------------------------------------------
# Volumes and certificates


def test_volumes_of_the_user_are_mounted_beside_the_charts_own(render: Render) -> None:
    mlflow = dict(pods(rendered(render, "platform", row("volumes", "platform"))))["mlflow"]
    runtime = one(rendered(render, "serving", row("volumes", "serving")), "ServingRuntime")["spec"]
    for spec, names in ((mlflow, ["tmp", "plugins"]), (runtime, ["tmp", "company-ca", "shm"])):
        assert [volume["name"] for volume in spec["volumes"]] == names
        assert [mount["name"] for mount in spec["containers"][0]["volumeMounts"]] == names


def test_everything_that_calls_out_trusts_the_authorities_of_the_user(render: Render) -> None:
    found = dict(pods(rendered(render, "platform", row("private-authority", "platform"))))
    assert found.keys() == {"mlflow", "bucket", "upload", "test"}
    path = "/etc/nvila/ca/bundle.pem"
    for component, spec in found.items():
        own = variables(spec)
        assert own["SSL_CERT_FILE"] == own["REQUESTS_CA_BUNDLE"] == own["AWS_CA_BUNDLE"] == path, component
        assert {"name": "ca", "configMap": {"name": "company-ca"}} in spec["volumes"]
        mount = {"name": "ca", "mountPath": "/etc/nvila/ca", "readOnly": True}
        assert mount in spec["containers"][0]["volumeMounts"]
    assert variables(found["mlflow"])["PGSSLROOTCERT"] == path


def test_a_database_whose_certificate_is_checked_is_checked_against_a_file_that_is_there(render: Render) -> None:
    def asked(ssl_mode: str, **external: Any) -> Any:
        values = {"bundled": {"enabled": False}, "external": {"enabled": True, "host": "db", "sslMode": ssl_mode}}
        own = variables(dict(pods(rendered(render, "platform", {"postgres": values})))["mlflow"])
        return own["PGSSLMODE"], own.get("PGSSLROOTCERT")

    assert asked("verify-full") == ("verify-full", SYSTEM)
    assert asked("verify-ca") == ("verify-ca", SYSTEM)
    # Naming a file makes libpq check against it with `require` too, which would refuse what worked.
    assert asked("require") == ("require", None)
    bundled = variables(dict(pods(rendered(render, "platform", {})))["mlflow"])
    assert "PGSSLROOTCERT" not in bundled
    assert "SSL_CERT_FILE" not in bundled


# ----------------------------------------------------------------------------------------------------------------------
# More objects


@each_chart
def test_more_objects_are_part_of_the_release(render: Render, name: str) -> None:
    mapping = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "{{ .Release.Name }}-more"},
        "data": {"chart": "{{ .Chart.Name }}", "port": "9000"},
    }
    documents = rendered(render, name, {"extraObjects": [mapping, yaml.safe_dump({**mapping, "kind": "Secret"})]})
    added = [document for document in documents if document["metadata"]["name"] == "demo-more"]
    assert sorted(document["kind"] for document in added) == ["ConfigMap", "Secret"]
    assert one(added, "ConfigMap")["data"] == {"chart": f"nvila-{name}", "port": "9000"}


# ----------------------------------------------------------------------------------------------------------------------
# What is refused

Refused = tuple[str, dict[str, Any], str]
REFUSED: dict[str, Refused] = {
    **{
        f"helms-own-annotation-{name}": (
            name,
            {"commonAnnotations": {"helm.sh/hook": "test"}},
            "at '/commonAnnotations/helm.sh~1hook'",
        )
        for name in NAMES
    },
    **{
        f"object-without-kind-{name}": (
            name,
            {"extraObjects": [{"apiVersion": "v1", "metadata": {"name": "x"}}]},
            "at '/extraObjects/0': missing property 'kind'",
        )
        for name in NAMES
    },
    "mode-of-the-endpoint": (
        "serving",
        {"endpoint": {"annotations": {"serving.kserve.io/deploymentMode": "Knative"}}},
        "at '/endpoint/annotations/serving.kserve.io~1deploymentMode'",
    ),
    "typo-in-a-toleration": (
        "serving",
        {"tolerations": [{"key": "gpu", "opertor": "Exists"}]},
        "at '/tolerations/0': additional properties 'opertor' not allowed",
    ),
    "typo-in-an-affinity": (
        "platform",
        {"mlflow": {"affinity": {"nodeAfinity": {}}}},
        "at '/mlflow/affinity': additional properties 'nodeAfinity' not allowed",
    ),
    "typo-in-a-spread": (
        "platform",
        {"mlflow": {"topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfied": "x"}]}},
        "at '/mlflow/topologySpreadConstraints/0': additional properties 'whenUnsatisfied' not allowed",
    ),
    "mount-over-the-charts-own": (
        "serving",
        {"server": {"extraVolumeMounts": [{"name": "x", "mountPath": "/etc/nvila/x"}]}},
        "at '/server/extraVolumeMounts/0/mountPath'",
    ),
    "volume-of-the-charts-own-name": (
        "platform",
        {"mlflow": {"extraVolumes": [{"name": "tmp", "emptyDir": {}}]}},
        "at '/mlflow/extraVolumes/0/name'",
    ),
    "typo-in-the-certificates": (
        "platform",
        {"trustedCertificates": {"existingSecret": "ca"}},
        "at '/trustedCertificates': additional properties 'existingSecret' not allowed",
    ),
}


@pytest.mark.parametrize(("name", "values", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_values_are_refused_by_name(helm: Helm, name: str, values: dict[str, Any], said: str) -> None:
    done = helm.template(chart(name), values, extra=API_FLAGS)
    assert done.returncode != 0
    assert said in done.stderr


@pytest.mark.parametrize("name", ["nvila", *(f"nvila-{name}" for name in NAMES)])
def test_a_catalogue_knows_what_the_chart_is(name: str) -> None:
    said = yaml.safe_load((CHARTS / name / "Chart.yaml").read_text("utf-8"))
    assert said["home"].startswith("https://")
    assert said["sources"] == [said["home"]]
    assert said["annotations"]["artifacthub.io/license"] == "Apache-2.0"
    for link in yaml.safe_load(said["annotations"]["artifacthub.io/links"]):
        place = link["url"].removeprefix(f"{said['home']}/blob/main/")
        assert (ROOT / place).is_file(), place
