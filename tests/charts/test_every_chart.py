"""What holds for every chart and every row of its matrix: valid resources, locked-down pods, selectors, labels.

charts/nvila-serving, whose pods KServe makes, has the same checks of its own in test_serving_chart.py.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from tests.charts.built_in_validation import BuiltInSchemas
    from tests.charts.conftest import Document, Helm
    from tests.charts.crd_validation import CrdSchemas

    Render = Callable[..., list[Document]]

ROOT = Path(__file__).resolve().parents[2]
CHARTS = ROOT / "charts"
HERE = Path(__file__).parent
# APIs of others that a cluster with everything has.
APIS = (
    "kubeflow.org/v1alpha1",
    "pipelines.kubeflow.org/v2beta1",
    "kueue.x-k8s.io/v1beta2",
    "monitoring.coreos.com/v1",
    "keda.sh/v1alpha1",
    "gateway.networking.k8s.io/v1",
)
API_FLAGS = tuple(word for api in APIS for word in ("--api-versions", api))
CLUSTER_SCOPED = {"ClusterQueue", "ResourceFlavor"}
# They hold for what runs on; hooks end.
LONG_RUNNING = {"Deployment", "StatefulSet", "InferenceService"}
NAMES = ("nvila-platform", "nvila-observability")
UMBRELLA = CHARTS / "nvila"
VERSION = str(yaml.safe_load((UMBRELLA / "Chart.yaml").read_text("utf-8"))["appVersion"])
PROFILES = ("laptop", "gpu", "production")
# What the docs have a user set once a pipeline has made a model; flags, since they come after the profile.
MODEL = "s3://nvila/artifacts/quantize/0123"
SERVE = ("--set", "parts.serving.enabled=true")
SERVING = (*SERVE, "--set", f"nvila-serving.model.storageUri={MODEL}")
# The keys of callers are a file.
SECRET_VOLUMES = {"InferenceService": {"secret"}}
SECRET_NAME = re.compile(r"(KEY|SECRET|PASSWORD|TOKEN|CREDENTIALS?)($|_)")
CHANGING_LABELS = {"helm.sh/chart", "app.kubernetes.io/version"}


def matrix(name: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a chart: name -> values."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((HERE / f"{name}_matrix.yaml").read_text("utf-8"))
    return found


def rows() -> Iterator[Any]:
    """Every chart with every row of its matrix, and the umbrella with every profile."""
    for name in ("platform", "observability"):
        for row, values in matrix(name).items():
            yield pytest.param(CHARTS / f"nvila-{name}", values, API_FLAGS, id=f"{name}-{row}")
    for row, values in matrix("umbrella").items():
        yield pytest.param(UMBRELLA, values, API_FLAGS, id=f"umbrella-{row}")
    for profile in PROFILES:
        yield pytest.param(UMBRELLA, {}, profile_flags(profile), id=f"profile-{profile}")
        yield pytest.param(UMBRELLA, {}, (*profile_flags(profile), *SERVING), id=f"profile-{profile}-serving")


def profile_flags(profile: str) -> tuple[str, ...]:
    return (*API_FLAGS, "--values", str(UMBRELLA / f"values-{profile}.yaml"))


ROWS = list(rows())
each_row = pytest.mark.parametrize(("chart", "values", "extra"), ROWS)


def pod_templates(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Yield kind of owner and pod template of everything that makes pods, KServe's predictors included."""
    for document in documents:
        if document["kind"] == "InferenceService":
            yield "InferenceService", predictor(documents, document)
        if document["kind"] == "Pod":
            yield "Pod", {"metadata": document["metadata"], "spec": document["spec"]}
        elif "template" in document.get("spec", {}) and document["kind"] in LONG_RUNNING | {"Job"}:
            yield document["kind"], document["spec"]["template"]


def predictor(documents: list[Document], service: Document) -> Document:
    """Return the template of the pods that KServe makes of an InferenceService and its runtime."""
    asked = service["spec"]["predictor"]
    (runtime,) = (
        d["spec"]
        for d in documents
        if d["kind"].endswith("ServingRuntime") and d["metadata"]["name"] == asked["model"]["runtime"]
    )
    own = {"serving.kserve.io/inferenceservice": service["metadata"]["name"], "component": "predictor"}
    return {
        "metadata": {"labels": service["metadata"]["labels"] | asked.get("labels", {}) | own},
        "spec": {**asked, "containers": runtime["containers"], "volumes": runtime["volumes"]},
    }


def selectors(document: Document) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the selectors of pods of a document."""
    spec = document.get("spec", {})
    if document["kind"] == "Service":
        yield "Service", spec["selector"]
    for key in ("selector", "podSelector"):
        if isinstance(spec.get(key), dict) and spec[key].get("matchLabels") and document["kind"] != "PodMonitor":
            yield document["kind"], spec[key]["matchLabels"]


def is_built_in(document: Document) -> bool:
    group = document["apiVersion"].rpartition("/")[0]
    return "." not in group or (group.endswith(".k8s.io") and not group.startswith(("kueue.", "gateway.")))


@each_row
def test_resources_of_kubernetes_are_valid(
    render: Render, built_in: BuiltInSchemas, chart: Path, values: dict[str, Any], extra: tuple[str, ...]
) -> None:
    for document in render(chart, values, extra=extra):
        if is_built_in(document):
            assert built_in.errors(document) == []


@each_row
def test_resources_of_others_match_their_definitions(
    render: Render, crds: CrdSchemas, chart: Path, values: dict[str, Any], extra: tuple[str, ...]
) -> None:
    for document in render(chart, values, extra=extra):
        if is_built_in(document):
            continue
        assert crds.errors(document) == []


@each_row
def test_pods_are_locked_down(render: Render, chart: Path, values: dict[str, Any], extra: tuple[str, ...]) -> None:
    for owner, template in pod_templates(render(chart, values, extra=extra)):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        for volume in spec.get("volumes", []):
            assert volume.keys() <= {"name", "emptyDir", "projected", "configMap"} | SECRET_VOLUMES.get(owner, set())
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


@each_row
def test_containers_have_requests_limits_and_probes(
    render: Render, chart: Path, values: dict[str, Any], extra: tuple[str, ...]
) -> None:
    for owner, template in pod_templates(render(chart, values, extra=extra)):
        for container in template["spec"]["containers"]:
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]
            if owner in LONG_RUNNING:
                assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
            else:
                assert template["spec"]["restartPolicy"] == "Never"


@each_row
def test_images_do_not_move(render: Render, chart: Path, values: dict[str, Any], extra: tuple[str, ...]) -> None:
    for _, template in pod_templates(render(chart, values, extra=extra)):
        for container in template["spec"]["containers"]:
            # A tag alone is the project's own, of this version; what others publish is named by its bytes.
            assert re.search(
                rf"(@sha256:[0-9a-f]{{64}}|(^|/)nvila/[a-z]+:{re.escape(VERSION)}(-cpu)?)$", container["image"]
            )


@each_row
def test_no_secret_is_written_down(render: Render, chart: Path, values: dict[str, Any], extra: tuple[str, ...]) -> None:
    documents = render(chart, values, extra=extra)
    assert not [document for document in documents if document["kind"] == "Secret"]
    for _, template in pod_templates(documents):
        for container in template["spec"]["containers"]:
            for variable in container.get("env", []):
                if SECRET_NAME.search(variable["name"]) and not variable["name"].endswith("_PATH"):
                    assert "value" not in variable, variable["name"]
                    assert "secretKeyRef" in variable["valueFrom"], variable["name"]
    for document in documents:
        if document["kind"] == "ConfigMap":
            assert not [key for key in document["data"] if SECRET_NAME.search(key)]


@each_row
def test_rights_are_small_and_stay_in_a_namespace(
    render: Render, chart: Path, values: dict[str, Any], extra: tuple[str, ...]
) -> None:
    for document in render(chart, values, extra=extra):
        assert document["kind"] not in {"ClusterRole", "ClusterRoleBinding"}
        for rule in document.get("rules", []):
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "secrets" not in rule["resources"]


@each_row
def test_resources_are_labelled_and_named_within_the_limits(
    render: Render, chart: Path, values: dict[str, Any], extra: tuple[str, ...]
) -> None:
    documents = render(chart, values, extra=extra)
    names = [(d["apiVersion"], d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in documents]
    assert len(names) == len(set(names))
    for document in documents:
        metadata = document["metadata"]
        assert ("namespace" in metadata) is (document["kind"] not in CLUSTER_SCOPED)
        assert metadata["labels"]["app.kubernetes.io/instance"] == "demo"
        assert metadata["labels"]["app.kubernetes.io/managed-by"] == "Helm"
        assert metadata["labels"]["app.kubernetes.io/part-of"] == "nvila"
        # A StatefulSet's pods carry `<name>-<hash of 10>` as a label.
        limit = 52 if document["kind"] == "StatefulSet" else 63
        assert len(metadata["name"]) <= limit or document["kind"] == "PipelineVersion"


@each_row
def test_selectors_find_exactly_the_pods_of_their_part(
    render: Render, chart: Path, values: dict[str, Any], extra: tuple[str, ...]
) -> None:
    documents = render(chart, values, extra=extra)
    pods = [template["metadata"]["labels"] for _, template in pod_templates(documents)]
    for document in documents:
        for kind, selector in selectors(document):
            if kind in ("PodMonitor", "ServiceMonitor"):
                # They watch the pods of other charts: test_observability_chart.py renders those beside them.
                continue
            assert not CHANGING_LABELS & selector.keys()
            found = [labels for labels in pods if selector.items() <= labels.items()]
            assert len(found) == 1, (kind, selector)


@pytest.mark.parametrize("name", NAMES)
def test_an_upgrade_of_the_chart_alone_changes_no_selector_and_restarts_no_pod(
    helm: Helm, tmp_path: Path, name: str
) -> None:
    newer = shutil.copytree(CHARTS / name, tmp_path / name)
    text = (newer / "Chart.yaml").read_text(encoding="utf-8")
    (newer / "Chart.yaml").write_text(re.sub(r"(?m)^version: .*$", "version: 9.9.9", text))

    def fixed(chart: Path) -> list[Any]:
        done = helm.template(chart, extra=API_FLAGS)
        assert done.returncode == 0, done.stderr
        found = [document for document in yaml.safe_load_all(done.stdout) if document]
        return [
            (document["kind"], document["spec"].get(key))
            for document in found
            for key in ("selector", "podSelector", "serviceName", "volumeClaimTemplates", "template")
            if document["kind"] != "Job" and "spec" in document
        ]

    assert fixed(newer) == fixed(CHARTS / name)


@pytest.mark.parametrize("name", NAMES)
def test_the_default_render(render: Render, golden: Callable[[str, str], None], name: str) -> None:
    text = yaml.safe_dump_all(render(CHARTS / name, extra=API_FLAGS), sort_keys=False, width=120)
    golden(f"charts/{name}.yaml", re.sub(r"\b0\.1\.0\b", "VERSION", text))


@pytest.mark.parametrize("profile", PROFILES)
def test_the_render_of_each_profile(render: Render, golden: Callable[[str, str], None], profile: str) -> None:
    documents = render(UMBRELLA, {}, "nvila", profile_flags(profile))
    # What is in the dashboards is in the golden file of their own chart.
    shown = [
        {**document, "data": sorted(document["data"])}
        if document["metadata"]["labels"].get("grafana_dashboard")
        else document
        for document in documents
    ]
    text = yaml.safe_dump_all(shown, sort_keys=False, width=120)
    golden(f"charts/nvila-{profile}.yaml", re.sub(r"\b0\.1\.0\b", "VERSION", text))


def test_enough_combinations_of_values_are_rendered() -> None:
    assert len(ROWS) + len(matrix("serving")) >= 60


def test_charts_have_one_version_and_the_umbrella_asks_for_it() -> None:
    charts = {path.parent.name: yaml.safe_load(path.read_text("utf-8")) for path in CHARTS.glob("*/Chart.yaml")}
    assert charts.keys() == {"nvila", *NAMES, "nvila-serving"}
    assert len({(chart["version"], chart["appVersion"], chart["kubeVersion"]) for chart in charts.values()}) == 1
    asked = {part["name"]: part["version"] for part in charts["nvila"]["dependencies"]}
    assert asked == {name: charts[name]["version"] for name in (*NAMES, "nvila-serving")}
    for name in asked:
        assert (UMBRELLA / "charts" / name).resolve() == CHARTS / name


@pytest.mark.parametrize("name", [*NAMES, "nvila-serving", "nvila"])
def test_schema_knows_exactly_the_keys_of_the_values(name: str) -> None:
    schema = json.loads((CHARTS / name / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((CHARTS / name / "values.yaml").read_text(encoding="utf-8"))

    def compare(node: dict[str, Any], value: Any, path: str) -> None:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        # An empty mapping with properties is Kubernetes' own, such as an affinity.
        if not value or not isinstance(value, dict) or not node.get("properties"):
            return
        assert node["additionalProperties"] is False, path
        assert node["properties"].keys() == value.keys(), path
        for key, child in value.items():
            compare(node["properties"][key], child, f"{path}/{key}")

    compare(schema, values, "")


@pytest.mark.parametrize("name", [*NAMES, "nvila"])
def test_lint_is_strict_and_clean(helm: Helm, name: str) -> None:
    done = helm.run("lint", "--strict", CHARTS / name)
    assert done.returncode == 0, done.stdout + done.stderr


REFUSED_BY_UMBRELLA: list[tuple[dict[str, Any], str]] = [
    ({"nvila-platfrom": {}}, "additional properties 'nvila-platfrom' not allowed"),
    ({"parts": {"serve": {}}}, "at '/parts': additional properties 'serve' not allowed"),
    ({"nvila-platform": {"mlfow": {}}}, "additional properties 'mlfow' not allowed"),
    ({"global": {"registry": "x"}}, "additional properties 'registry' not allowed"),
    (
        {"nvila-platform": {"s3": {"minio": {"enabled": True}}}},
        "s3.seaweedfs.enabled and s3.minio.enabled are on together",
    ),
    ({"parts": {"platform": {"enabled": False}}}, "nothing is on: turn on one of parts.platform.enabled"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED_BY_UMBRELLA)
def test_the_umbrella_refuses_wrong_values_of_its_own_and_of_its_parts(
    helm: Helm, values: dict[str, Any], said: str
) -> None:
    done = helm.template(UMBRELLA, values, extra=API_FLAGS)
    assert done.returncode != 0
    assert said in done.stderr


def test_the_archive_of_the_umbrella_holds_its_parts_and_renders_alone(helm: Helm, tmp_path: Path) -> None:
    done = helm.run("package", UMBRELLA, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("nvila-*.tgz")
    alone, here = (
        helm.template(chart, matrix("umbrella")["everything"], extra=API_FLAGS) for chart in (archive, UMBRELLA)
    )
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout == here.stdout


def test_a_part_takes_the_umbrellas_registry_and_leaves_nothing_when_off(render: Render) -> None:
    def images(values: dict[str, Any]) -> set[str]:
        return {
            container["image"]
            for _, template in pod_templates(render(UMBRELLA, values, extra=API_FLAGS))
            for container in template["spec"]["containers"]
        }

    mirrored = images(matrix("umbrella")["mirrored"])
    assert {image.rpartition("/")[2].partition(":")[0] for image in mirrored} == {
        "mlflow", "pipelines", "serve", "postgres", "seaweedfs",
    }  # fmt: skip
    assert all(image.startswith("mirror.example.com/") for image in mirrored), mirrored
    # The registry that a user pushed to has the project's own images, and none of others.
    pushed = images({"global": {"imageRegistry": "registry.example.com"}})
    assert {image.partition("/")[0] for image in pushed if "/nvila/" in image} == {"registry.example.com"}
    assert {image.partition("/")[0] for image in pushed if "/nvila/" not in image} == {"docker.io"}
    kinds = {document["kind"] for document in render(UMBRELLA, matrix("umbrella")["serving-alone"], extra=API_FLAGS)}
    assert kinds == {
        "InferenceService",
        "ServingRuntime",
        "ServiceAccount",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Pod",
    }


@pytest.mark.parametrize(
    ("row", "on", "third"),
    [
        ("defaults", "platform", "port-forward service/demo-platform-mlflow 5000:5000"),
        ("foreign-mlflow", "platform", "get configmap demo-platform-settings -o yaml"),
        ("serving-alone", "serving", "wait inferenceservice/demo-serving --for=condition=Ready"),
        ("observability-alone", "observability", "get podmonitors,servicemonitors,prometheusrules,configmaps"),
        ("everything", "observability, platform, serving", "port-forward service/demo-platform-mlflow 5000:5000"),
    ],
)
def test_notes_of_the_umbrella_give_the_next_three_commands(helm: Helm, row: str, on: str, third: str) -> None:
    # An installation without a cluster knows no API of others.
    without = {"nvila-observability": {"monitors": {"enabled": False}, "rules": {"enabled": False}}}
    done = helm.run(
        "install", "demo", UMBRELLA, "--namespace", "models", "--dry-run=client", "--values", "-",
        stdin=yaml.safe_dump(matrix("umbrella")[row] | without),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, _, notes = done.stdout.rpartition("NOTES:")
    assert f"with: {on}." in notes
    commands = [line.strip() for line in notes.splitlines() if line.startswith("     ")]
    assert [command.split()[0] for command in commands] == ["kubectl", "helm", "kubectl"]
    assert third in commands[2]
    # helm hides the notes of parts, so sending the reader to the notes would show these lines again.
    assert "get notes" not in notes


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_serves_nothing_until_a_model_is_named(helm: Helm, render: Render, profile: str) -> None:
    first = render(UMBRELLA, {}, "nvila", profile_flags(profile))
    assert "InferenceService" not in {document["kind"] for document in first}
    # No profile names a model that nobody has made.
    text = (UMBRELLA / f"values-{profile}.yaml").read_text(encoding="utf-8")
    assert "storageUri" not in yaml.safe_load(text)["nvila-serving"].get("model", {})
    done = helm.template(UMBRELLA, {}, "nvila", (*profile_flags(profile), *SERVE))
    assert "model.storageUri is empty: name the model's folder" in done.stderr
    second = render(UMBRELLA, {}, "nvila", (*profile_flags(profile), *SERVING))
    (service,) = (document for document in second if document["kind"] == "InferenceService")
    assert service["spec"]["predictor"]["model"]["storageUri"] == MODEL


@pytest.mark.parametrize("profile", PROFILES)
def test_rights_and_accounts_of_a_profile_fit_its_kubeflow(render: Render, profile: str) -> None:
    documents = render(UMBRELLA, {}, "nvila", (*profile_flags(profile), *SERVING, "--namespace", "nvila"))
    (service,) = (d["metadata"]["namespace"] for d in documents if d["kind"] == "InferenceService")
    bindings = {d["roleRef"]["name"].rpartition("-")[2]: d for d in documents if d["kind"] == "RoleBinding"}
    # Pipelines may deploy where the endpoint of the release is.
    assert bindings["inferenceservices"]["metadata"]["namespace"] == service
    (account,) = bindings["trainjobs"]["subjects"]
    assert account["namespace"] == bindings["trainjobs"]["metadata"]["namespace"]
    # A Kubeflow that asks for tokens serves several users, whose runs are in their own namespaces.
    several = "serviceAccountToken" in json.dumps(documents)
    assert several is (profile == "production")
    assert (account["name"] == "default-editor") is several
    assert (account["namespace"] == "kubeflow") is (profile == "gpu")
    watched = {n for d in documents if d["kind"] == "PodMonitor" for n in d["spec"]["namespaceSelector"]["matchNames"]}
    assert not watched or {service, account["namespace"]} <= watched
