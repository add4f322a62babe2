"""The tiny lifecycle on the cluster that `make kind` makes: submitted, followed, registered, served, asked.

Run by `make kind-e2e`; by hand: pytest --cluster tests/cluster, with KUBECONFIG set. Takes the better part of an hour.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nvila_platform.registry import ModelVersion, resolve
from nvila_platform.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE, PIPELINES, RELEASE = "nvila", "kubeflow", "nvila"
RUN_S, READY_S = 3600, 900

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(RUN_S + 2 * READY_S)]


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run kubectl or helm on the cluster of the kubeconfig."""
    path = f"{ROOT / '.tools' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [name, *arguments], capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}
    )


@contextmanager
def forwarded(namespace: str, service: str, port: int) -> Iterator[str]:
    """Reach a service of the cluster; yields its address on this machine."""
    path = f"{ROOT / '.tools' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = ["kubectl", "-n", namespace, "port-forward", f"service/{service}", f":{port}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PATH": path}
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"127\.0\.0\.1:(\d+)", line)
        assert found, f"{service}: {line}{process.stderr.read() if process.stderr and not line else ''}"
        yield f"http://127.0.0.1:{found[1]}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def nvila(*arguments: str) -> dict[str, Any]:
    """Run the command; returns its JSON."""
    command = [sys.executable, "-c", "import sys; from nvila_pipelines.cli import main; sys.exit(main())"]
    done = subprocess.run([*command, *arguments, "--json"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def run_id() -> str:
    """Submit the lifecycle and wait until it has succeeded."""
    with forwarded(PIPELINES, "ml-pipeline", 8888) as endpoint:
        where = ("--endpoint", endpoint)
        submitted = nvila(
            "pipeline", "submit", "lifecycle", "recipe=fast", *where,
            "--profile", str(ROOT / "examples" / "kind-profile.yaml"), "--service-account", "pipeline-runner",
        )  # fmt: skip
        run_id = str(submitted["run_id"])
        deadline = time.monotonic() + RUN_S
        while time.monotonic() < deadline:
            (run,) = (one for one in nvila("pipeline", "list", *where)["runs"] if one["run_id"] == run_id)
            if run["state"] == "SUCCEEDED":
                return run_id
            if run["state"] in {"FAILED", "CANCELED"}:
                pytest.fail("\n".join(nvila("pipeline", "logs", run_id, *where)["lines"]))
            time.sleep(15)
    pytest.fail(f"run {run_id} is still {run['state']} after {RUN_S} s")


@pytest.fixture(scope="module")
def version(run_id: str) -> ModelVersion:
    """What the run registered."""
    with forwarded(NAMESPACE, f"{RELEASE}-platform-mlflow", 5000) as tracking:
        return resolve(Settings.load(environ={"NVILA_TRACKING_URI": tracking}), "models:/nvila@candidate")


def test_the_run_registers_a_model_that_passed_the_gate(version: ModelVersion) -> None:
    assert version.step == "quantize"
    assert version.uri.startswith("s3://nvila/")


def test_kserve_serves_that_model_and_it_answers(version: ModelVersion) -> None:
    values = {
        "parts.serving.enabled": "true",
        "nvila-serving.model.storageUri": f"{version.uri}/model",
        "nvila-platform.pipelines.namespace": PIPELINES,
        "nvila-platform.pipelines.rbac.servingNamespace": NAMESPACE,
    }
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    laptop = ("--values", str(ROOT / "charts" / "nvila" / "values-laptop.yaml"))
    tool("helm", "upgrade", RELEASE, str(ROOT / "charts" / "nvila"), "--namespace", NAMESPACE, *laptop, *sets)
    name = f"{RELEASE}-serving"
    wait = ("wait", f"inferenceservice/{name}", "--for=condition=Ready", f"--timeout={READY_S}s")
    tool("kubectl", "-n", NAMESPACE, *wait)
    with forwarded(NAMESPACE, f"{name}-predictor", 80) as endpoint:
        body = {"model": name, "max_tokens": 8, "messages": [{"role": "user", "content": "is there a circle?"}]}
        request = urllib.request.Request(  # noqa: S310 - a forwarded port of this machine
            f"{endpoint}/openai/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            assert json.load(answer)["choices"][0]["message"]["content"]
        tool("helm", "test", RELEASE, "--namespace", NAMESPACE)
