"""Charts refuse to install where a secret that they name is missing: real helm asks an API server here."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from tests.charts.conftest import Helm

Serve = Callable[[type[BaseHTTPRequestHandler]], AbstractContextManager[int]]
CHARTS = Path(__file__).resolve().parents[2] / "charts"
SECRETS = {"nvila-s3": ["access-key", "secret-key"], "nvila-postgres": ["password"]}
KEYS = {"access": {"existingSecret": "nvila-api-keys"}, "serviceAccount": {"secrets": ["nvila-storage"]}}
ABSENT: dict[str, Any] = {"kind": "Status", "code": 404, "reason": "NotFound"}


@pytest.fixture
def cluster(tmp_path: Path, serve_http: Serve) -> Iterator[tuple[dict[str, list[str]], Path]]:
    """A cluster's secrets (name -> keys; with a namespace where it is not the release's), and a kubeconfig."""
    secrets: dict[str, list[str]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            namespace, _, name = path.removeprefix("/api/v1/namespaces/").partition("/secrets")
            name = f"{'' if namespace == 'models' else f'{namespace}/'}{name.strip('/')}"
            known: dict[str, dict[str, Any]] = {
                "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
                "/api": {"kind": "APIVersions", "versions": ["v1"]},
                "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
                "/api/v1": {
                    "kind": "APIResourceList",
                    "groupVersion": "v1",
                    "resources": [{"name": "secrets", "namespaced": True, "kind": "Secret", "verbs": ["get", "list"]}],
                },
                f"/api/v1/namespaces/{namespace}/secrets": {
                    "kind": "SecretList", "apiVersion": "v1", "items": [secret(one) for one in secrets]
                },
            }  # fmt: skip
            body = known.get(path, secret(name) if name in secrets else ABSENT)
            text = json.dumps(body).encode()
            self.send_response(int(body.get("code", 200)))
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    def secret(name: str) -> dict[str, Any]:
        data = dict.fromkeys(secrets[name], "eA==")
        return {"kind": "Secret", "apiVersion": "v1", "metadata": {"name": name, "namespace": "models"}, "data": data}

    with serve_http(Handler) as port:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "", "namespace": "models"}}],
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        yield secrets, tmp_path / "kubeconfig"


def render(helm: Helm, kubeconfig: Path, chart: str, values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Render a chart as an installation does, asking the cluster."""
    command = [str(helm.binary), "template", "demo", str(CHARTS / chart), "--namespace", "models", "--values", "-"]
    return subprocess.run(
        [*command, "--dry-run=server", "--disable-openapi-validation"],
        input=yaml.safe_dump(values),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": os.environ["PATH"], "HOME": str(helm.home), "KUBECONFIG": str(kubeconfig)},
    )


def admitted(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether the templates refused nothing. What helm does next is to look for kinds, which this cluster has not."""
    return (
        "unable to build kubernetes objects from release manifest" in done.stderr and "names secret" not in done.stderr
    )


def test_a_missing_secret_is_refused_with_the_command_that_makes_it(
    helm: Helm, cluster: tuple[dict[str, list[str]], Path]
) -> None:
    secrets, kubeconfig = cluster
    for name, make in (
        ("nvila-s3", "create secret generic nvila-s3 --from-literal=access-key=... --from-literal=secret-key=..."),
        ("nvila-postgres", "create secret generic nvila-postgres --from-literal=password=..."),
    ):
        done = render(helm, kubeconfig, "nvila-platform", {})
        assert done.returncode != 0
        assert f'existingSecret names secret "{name}", which namespace models does not have' in done.stderr
        assert f"kubectl -n models {make}; or set checkSecrets=false" in done.stderr
        secrets[name] = SECRETS[name]
    done = render(helm, kubeconfig, "nvila-platform", {})
    assert admitted(done), done.stderr


def test_pipelines_elsewhere_need_the_keys_of_the_store_there(
    helm: Helm, cluster: tuple[dict[str, list[str]], Path]
) -> None:
    secrets, kubeconfig = cluster
    secrets.update(SECRETS)
    values = {"pipelines": {"namespace": "team"}}
    done = render(helm, kubeconfig, "nvila-platform", values)
    assert 's3.existingSecret names secret "nvila-s3", which namespace team does not have' in done.stderr
    assert "kubectl -n team create secret generic nvila-s3 --from-literal=access-key=..." in done.stderr
    secrets["team/nvila-s3"] = ["access-key"]
    done = render(helm, kubeconfig, "nvila-platform", values)
    assert 's3.existingSecret names secret "nvila-s3", which has no key "secret-key"' in done.stderr
    secrets["team/nvila-s3"] = SECRETS["nvila-s3"]
    assert admitted(render(helm, kubeconfig, "nvila-platform", values))
    assert admitted(render(helm, kubeconfig, "nvila-platform", {"pipelines": {"namespace": "models"}}))


def test_a_secret_without_its_key_is_refused(helm: Helm, cluster: tuple[dict[str, list[str]], Path]) -> None:
    secrets, kubeconfig = cluster
    secrets.update(SECRETS | {"nvila-postgres": ["pw"]})
    done = render(helm, kubeconfig, "nvila-platform", {})
    assert 'postgres.existingSecret names secret "nvila-postgres", which has no key "password"' in done.stderr
    assert admitted(render(helm, kubeconfig, "nvila-platform", {"postgres": {"passwordKey": "pw"}}))


def test_a_database_that_is_not_used_needs_no_secret(helm: Helm, cluster: tuple[dict[str, list[str]], Path]) -> None:
    secrets, kubeconfig = cluster
    secrets["nvila-s3"] = SECRETS["nvila-s3"]
    values = {"mlflow": {"enabled": False, "externalUri": "https://mlflow.example.com"}}
    assert admitted(render(helm, kubeconfig, "nvila-platform", values))


@pytest.mark.parametrize("chart", ["nvila-platform", "nvila-serving"])
def test_where_secrets_come_later_nothing_is_asked(
    helm: Helm, cluster: tuple[dict[str, list[str]], Path], chart: str
) -> None:
    values = {"checkSecrets": False, **(KEYS if chart == "nvila-serving" else {})}
    assert admitted(render(helm, cluster[1], chart, values))


def test_serving_needs_the_keys_of_callers_and_of_its_storage(
    helm: Helm, cluster: tuple[dict[str, list[str]], Path]
) -> None:
    secrets, kubeconfig = cluster
    done = render(helm, kubeconfig, "nvila-serving", KEYS)
    assert "kubectl -n models create secret generic nvila-api-keys --from-file=api-keys=..." in done.stderr
    secrets["nvila-api-keys"] = ["api-keys"]
    done = render(helm, kubeconfig, "nvila-serving", KEYS)
    assert 'serviceAccount.secrets names secret "nvila-storage", which namespace models does not have' in done.stderr
    secrets["nvila-storage"] = ["AWS_ACCESS_KEY_ID"]
    done = render(helm, kubeconfig, "nvila-serving", KEYS)
    assert admitted(done), done.stderr
