"""What a user of charts/nvila-serving meets: the package, the notes after installation and `helm test`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.charts.conftest import Document, Helm

    Render = Callable[..., list[Document]]

ROOT = Path(__file__).resolve().parents[2]
Serve = Callable[[type[BaseHTTPRequestHandler]], AbstractContextManager[int]]
CHART = ROOT / "charts" / "nvila-serving"


def test_lint_is_strict_and_clean(helm: Helm) -> None:
    done = helm.run("lint", "--strict", CHART)
    assert done.returncode == 0, done.stdout + done.stderr


def test_package_holds_what_an_installation_needs(helm: Helm, tmp_path: Path) -> None:
    done = helm.run("package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("nvila-serving-*.tgz")
    shutil.unpack_archive(archive, tmp_path / "out")
    packed = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    source = {f"nvila-serving/{path.relative_to(CHART).as_posix()}" for path in CHART.rglob("*") if path.is_file()}
    assert packed == source


def test_notes_give_the_next_three_commands(helm: Helm) -> None:
    done = helm.run("install", "demo", CHART, "--namespace", "models", "--dry-run=client")
    assert done.returncode == 0, done.stderr
    _, _, notes = done.stdout.partition("NOTES:")
    commands = re.findall(r"^ +(kubectl|curl) (.+)$", notes, re.MULTILINE)
    assert [program for program, _ in commands] == ["kubectl", "kubectl", "curl"]
    assert "wait inferenceservice/demo-nvila-serving --for=condition=Ready" in commands[0][1]
    assert "port-forward service/demo-nvila-serving-predictor 8080:80" in commands[1][1]
    body = json.loads(re.findall(r"-d '(.+)'", commands[2][1])[0])
    assert body["model"] == "demo-nvila-serving"
    assert "helm test demo -n models" in notes


def model_server(model: str) -> type[BaseHTTPRequestHandler]:
    """Serve the route that the test pod asks, on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # As the server does before its model is loaded.
            status = 404 if self.path != "/health" else 503 if model == "absent" else 200
            body = json.dumps({"state": "ready", "model": model}).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

    return Handler


def run_test_pod(pod: Document, port: int) -> subprocess.CompletedProcess[str]:
    container = pod["spec"]["containers"][0]
    env = {item["name"]: item["value"] for item in container["env"]}
    env |= {"MODEL_NAME": "eyes", "SERVICE": "127.0.0.1", "PORTS": f"1 {port}", "TIMEOUT_S": "1.5"}
    command = [sys.executable, *container["command"][1:], *container["args"]]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=env)


@pytest.mark.parametrize(
    ("model", "passes", "said"),
    [("eyes", True, ""), ("other", False, "serves other, not eyes"), ("absent", False, "no answer in time; last:")],
)
def test_the_test_pod_tells_a_served_model_from_a_missing_one(
    render: Render, serve_http: Serve, model: str, passes: bool, said: str
) -> None:
    pod = next(document for document in render(CHART) if document["kind"] == "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    with serve_http(model_server(model)) as port:
        done = run_test_pod(pod, port)
    assert (done.returncode == 0) is passes, done.stderr
    assert said in done.stderr
