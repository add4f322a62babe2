"""`nvila doctor --cluster` against a server that answers as a cluster's API server does."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvila_pipelines.cli.cluster_checks import PARTS

ROOT = Path(__file__).resolve().parents[3]
GROUPS = {part.group for part in PARTS}


class Cluster(ThreadingHTTPServer):
    """What a test says about its cluster."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.minor = "34+"
        self.groups = set(GROUPS)
        self.resources = ["scheduledworkflows", "viewers"]
        self.gpus: list[dict[str, str]] = [{"nvidia.com/gpu": "8"}, {"cpu": "4"}]
        self.classes: dict[str, str] = {"fast": "false", "standard": "true"}
        self.denied: set[str] = set()
        self.forbidden: set[str] = set()
        self.asked: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    server: Cluster

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def do_GET(self) -> None:
        cluster = self.server
        path = self.path.rstrip("/")
        if path in cluster.forbidden:
            self.say(403, {"kind": "Status", "message": "forbidden"})
        elif path == "/version":
            blank = dict.fromkeys(
                ("gitVersion", "gitCommit", "gitTreeState", "buildDate", "goVersion", "compiler", "platform"), ""
            )
            self.say(200, blank | {"major": "1", "minor": cluster.minor})
        elif path == "/apis":
            groups = [
                {"name": name, "versions": [{"groupVersion": f"{name}/v1", "version": "v1"}]} for name in cluster.groups
            ]
            self.say(200, {"kind": "APIGroupList", "groups": groups})
        elif path == "/apis/kubeflow.org/v1beta1":
            found = [
                {"name": name, "namespaced": True, "kind": name, "singularName": "", "verbs": ["get"]}
                for name in cluster.resources
            ]
            self.say(200, {"kind": "APIResourceList", "groupVersion": "kubeflow.org/v1beta1", "resources": found})
        elif path == "/api/v1/nodes":
            self.say(200, {"items": [{"status": {"allocatable": one}} for one in cluster.gpus]})
        elif path == "/apis/storage.k8s.io/v1/storageclasses":
            mark = "storageclass.kubernetes.io/is-default-class"
            items = [
                {"metadata": {"name": name, "annotations": {mark: value}}, "provisioner": "p"}
                for name, value in cluster.classes.items()
            ]
            self.say(200, {"items": items})
        else:
            self.say(404, {"kind": "Status", "message": "page not found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["spec"]["resourceAttributes"]
        self.server.asked.append(asked)
        self.say(201, {"spec": body["spec"], "status": {"allowed": asked["resource"] not in self.server.denied}})

    def say(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster with everything, named by the kubeconfig."""
    server = Cluster()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    config = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "models"}}],
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "u", "user": {}}],
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def checks(nvila: Callable[..., Any], *arguments: str) -> dict[str, dict[str, str]]:
    done = nvila("doctor", "--cluster", "--json", *arguments)
    assert done.code == (0 if done.last_json["ok"] else 1)
    return {check["name"]: check for check in done.last_json["checks"]}


def test_a_cluster_with_everything_is_ready(nvila: Callable[..., Any], cluster: Cluster) -> None:
    done = nvila("doctor", "--cluster")
    assert done.code == 0
    assert done.out.splitlines()[-1] == "ready: docs/install.md"
    assert "here, Kubernetes 1.34+, namespace models" in done.out
    found = checks(nvila)
    assert {check["status"] for check in found.values()} == {"ok"}
    assert found["GPUs"]["detail"] == "8 on 1 of 2 nodes"
    assert found["storage"]["detail"] == "standard is the default class"
    assert {asked["namespace"] for asked in cluster.asked} == {"models"}
    checks(nvila, "--namespace", "other")
    assert cluster.asked[-1]["namespace"] == "other"


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.group)
def test_every_missing_part_is_named_with_what_adds_it(nvila: Callable[..., Any], cluster: Cluster, part: Any) -> None:
    cluster.groups.remove(part.group)
    found = checks(nvila)
    assert found[part.name]["status"] == part.absent
    assert found[part.name]["detail"] == f"no {part.group}; needed for {part.use}"
    # To be pasted, and to add the same version tomorrow.
    assert re.match(r"(helm install|kubectl apply) ", found[part.name]["fix"])
    for command in part.fix.split(" && "):
        assert re.search(r"(--version |\?ref=|/download/)v?\d+\.\d+", command), command
    assert [name for name, check in found.items() if check["status"] != "ok"] == [part.name]


def test_the_versions_are_those_of_the_guide_and_of_the_script() -> None:
    fixes = {part.name: part.fix for part in PARTS}
    guide = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"(?m)^\| \[([^]]+)\]\([^)]*\)[^|]*\| ([\d.]+) \|", guide))
    # The operator comes with a chart whose version is another.
    said = {
        name: rows[name]
        for name in ("KServe", "Kubeflow Pipelines", "Kubeflow Trainer", "KEDA", "Kueue", "Gateway API")
    }
    for name, version in said.items():
        assert re.search(rf"(--version |ref=|/)v?{re.escape(version)}(\.\d+)?(?=[ /\"]|$)", fixes[name]), name
    script = (ROOT / "scripts" / "kind.sh").read_text(encoding="utf-8")
    for variable, name in {
        "CERT_MANAGER": "cert-manager",
        "KSERVE": "KServe",
        "KFP": "Kubeflow Pipelines",
        "TRAINER": "Kubeflow Trainer",
    }.items():
        (version,) = re.findall(rf"(?m)^{variable}=(\S+)$", script)
        assert version in fixes[name], name


def test_the_profiles_name_the_release_of_the_operator_that_the_fix_installs() -> None:
    (fix,) = (part.fix for part in PARTS if part.name == "Prometheus operator")
    for name in ("gpu", "production"):
        values = yaml.safe_load((ROOT / "charts" / "nvila" / f"values-{name}.yaml").read_text(encoding="utf-8"))
        watched = values["nvila-observability"]
        assert {watched[part]["labels"]["release"] for part in ("monitors", "rules")} == {fix.split()[2]}


def test_what_is_missing_is_told_in_the_last_line(nvila: Callable[..., Any], cluster: Cluster) -> None:
    cluster.groups -= {"serving.kserve.io", "keda.sh"}
    done = nvila("doctor", "--cluster")
    assert done.code == 1
    assert done.out.splitlines()[-1] == "missing for the cluster: KServe"


def test_the_group_of_pipelines_is_used_by_others_too(nvila: Callable[..., Any], cluster: Cluster) -> None:
    cluster.resources = ["notebooks"]
    assert checks(nvila)["Kubeflow Pipelines"]["status"] == "missing"


def test_an_old_cluster_is_refused(nvila: Callable[..., Any], cluster: Cluster) -> None:
    cluster.minor = "29"
    found = checks(nvila)
    assert found["cluster"]["fix"] == "upgrade to Kubernetes 1.30 or newer"
    assert found.keys() == {"cluster"}


@pytest.mark.parametrize(
    ("path", "name", "what"),
    [
        ("/api/v1/nodes", "GPUs", "this user may not look at nodes"),
        ("/apis/storage.k8s.io/v1/storageclasses", "storage", "this user may not look at storage classes"),
    ],
)
def test_what_a_user_may_not_see_is_no_reason_to_fail(
    nvila: Callable[..., Any], cluster: Cluster, path: str, name: str, what: str
) -> None:
    cluster.forbidden.add(path)
    found = checks(nvila)
    assert (found[name]["status"], found[name]["detail"]) == ("warn", what)


def test_a_cluster_without_gpus_default_storage_and_rights_is_usable(
    nvila: Callable[..., Any], cluster: Cluster
) -> None:
    cluster.gpus, cluster.classes, cluster.denied = [{"cpu": "4"}], {"fast": "false"}, {"trainjobs"}
    found = checks(nvila)
    assert found["GPUs"]["detail"] == "0 on 0 of 1 nodes"
    assert found["storage"]["detail"] == "no default class among: fast"
    assert found["may create trainjobs"]["detail"].startswith("not in namespace models; needed for training")
    assert found["may create inferenceservices"]["status"] == "ok"
    assert all(check["fix"] for check in found.values() if check["status"] != "ok")


def test_without_a_cluster_there_is_one_line(
    nvila: Callable[..., Any], cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster.shutdown()
    cluster.server_close()
    found = checks(nvila)
    assert found["cluster"]["detail"].startswith("here does not answer: ")
    assert found["cluster"]["fix"] == "kubectl --context here version"
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    assert checks(nvila)["cluster"]["fix"] == "set KUBECONFIG, or write ~/.kube/config"


def test_a_namespace_belongs_to_a_cluster(nvila: Callable[..., Any]) -> None:
    done = nvila("doctor", "--namespace", "models")
    assert done.code == 2
    assert "add --cluster" in done.err
