"""The images are really built, without a daemon, on a Debian made here; the servers in them answer.

Needs root, buildah, debootstrap and Debian's archive; minutes and some gigabytes. Registries of images are not asked.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import images
import local_engine
import pytest

if TYPE_CHECKING:
    from tests.charts.conftest import Document

    Render = Callable[..., list[Document]]

ROOT = Path(__file__).resolve().parents[2]

# Minutes of downloads and copies on an idle machine; an hour on one that is busy, the base image included.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[images.Builder]:
    """Buildah with a storage of its own that holds a stand-in of the base image."""
    if lacks := local_engine.missing():
        pytest.skip(f"needs {lacks}")
    # A storage that is kept saves the next run the base image.
    kept = os.environ.get("NVILA_IMAGE_STORE", "")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("images")
    try:
        yield local_engine.open_store(folder)
    except local_engine.NoArchiveError as error:
        pytest.skip(str(error))
    finally:
        if not kept:
            # Gigabytes; pytest would keep the last three.
            shutil.rmtree(folder, ignore_errors=True)


def run(
    builder: images.Builder, tag: str, *command: str, volumes: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a command in a fresh container of an image."""
    base = ["buildah", *builder.options]
    name = local_engine.buildah(builder.options, "from", "--pull-never", tag)
    try:
        program = [*base, "run", "--isolation", "chroot", *volumes, name, "--", *command]
        return subprocess.run(program, capture_output=True, text=True, check=False, timeout=300)
    finally:
        subprocess.run([*base, "rm", name], capture_output=True, check=True)


def config_of(builder: images.Builder, tag: str) -> dict[str, Any]:
    said = local_engine.buildah(builder.options, "inspect", "--type", "image", tag)
    found: dict[str, Any] = json.loads(said)["Docker"]["config"]
    return found


@pytest.fixture(scope="module")
def build(builder: images.Builder) -> Callable[[str], str]:
    """Build an image once; returns its tag."""
    tags: dict[str, str] = {}

    def once(name: str) -> str:
        if name not in tags:
            tags[name] = images.build(builder, name, registry="localhost/nvila", base=local_engine.BASE, cpu=False)
        return tags[name]

    return once


def test_the_light_image_names_its_version_and_its_packages_and_has_no_torch(
    builder: images.Builder, build: Callable[[str], str]
) -> None:
    tag = build("pipelines")
    said = run(builder, tag, "nvila", "version")
    assert said.returncode == 0, said.stderr
    assert tag.rpartition(":")[2] in said.stdout
    assert run(builder, tag, "id", "-u").stdout.strip() == "10001"
    assert "No module named 'torch'" in run(builder, tag, "python", "-c", "import torch").stderr
    sbom = json.loads(run(builder, tag, "cat", "/usr/share/sbom/nvila.cdx.json").stdout)
    assert sbom["bomFormat"] == "CycloneDX"
    assert {"kfp", "mlflow", "minio"} <= {component["name"].lower() for component in sbom["components"]}
    # It does what its steps need: the graphs compile in it.
    program = (
        "import tempfile, pathlib; from nvila_pipelines.compile import GRAPHS, compile_graph\n"
        "print(compile_graph(GRAPHS[0], pathlib.Path(tempfile.mkdtemp()) / 'compiled.yaml'))"
    )
    made = run(builder, tag, "python", "-c", program)
    assert made.stdout.strip().endswith("/compiled.yaml"), made.stderr


def test_the_server_in_the_image_answers_a_question(
    builder: images.Builder, build: Callable[[str], str], tmp_path: Path
) -> None:
    import torch

    from nvila.configuration import NVILAConfig
    from nvila.modeling import NVILAForConditionalGeneration
    from nvila.processing import NVILAProcessor

    tag = build("serve")
    config = config_of(builder, tag)
    assert config["User"] == "10001:10001"
    assert config["Labels"]["org.opencontainers.image.version"] == tag.rpartition(":")[2]
    torch.manual_seed(0)
    NVILAForConditionalGeneration(NVILAConfig.from_preset("tiny-nvila-lite")).save_pretrained(tmp_path)
    NVILAProcessor.from_preset("tiny-nvila-lite").save_pretrained(tmp_path)
    for path in (tmp_path.parent.parent, tmp_path.parent, tmp_path, *tmp_path.iterdir()):
        path.chmod(0o755)

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    base = ["buildah", *builder.options]
    name = local_engine.buildah(builder.options, "from", "--pull-never", tag)
    # The image's own command, on this machine's loopback and a free port.
    command = [*config["Entrypoint"], *config["Cmd"], "--host", "127.0.0.1", "--port", str(port)]
    mount = ("--network", "host", "--volume", f"{tmp_path}:/mnt/models:ro")
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [*base, "run", "--isolation", "chroot", *mount, name, "--", *command], stdout=log, stderr=log
        )
    try:
        began = time.monotonic()
        wait_ready(server, port, tmp_path / "log")
        print(f"cold start in the image: {time.monotonic() - began:.1f} s")
        names = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/openai/v1/models", timeout=10))
        messages = [{"role": "user", "content": "what is it?"}]
        body = {"model": names["data"][0]["id"], "max_tokens": 4, "messages": messages}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/openai/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.load(urllib.request.urlopen(request, timeout=60))  # noqa: S310
        assert answer["usage"]["completion_tokens"] >= 1
        # The image's health check, as Docker would run it, against this port.
        check = [word.replace(":8080/", f":{port}/") for word in config["Healthcheck"]["Test"][1:]]
        assert run(builder, tag, *check, volumes=("--network", "host")).returncode == 0
    finally:
        server.terminate()
        server.wait(timeout=60)
        subprocess.run([*base, "rm", name], capture_output=True, check=False)


HOST = "mlflow.example.com"


def mlflow_container(render: Render, port: int) -> dict[str, Any]:
    """Return MLflow's container as charts/nvila-platform renders it."""
    values = {"mlflow": {"port": port, "workers": 1, "allowedHosts": [HOST]}}
    documents = render(ROOT / "charts" / "nvila-platform", values)
    owner = next(
        one for one in documents if one["kind"] == "Deployment" and one["metadata"]["name"].endswith("-mlflow")
    )
    found: dict[str, Any] = owner["spec"]["template"]["spec"]["containers"][0]
    return found


def mlflow_settings(container: dict[str, Any]) -> dict[str, str]:
    """Return its variables, with a database in a file instead of Postgres and made-up keys of a store."""
    given = {one["name"]: one.get("value", "made-up") for one in container["env"]}
    return given | {"MLFLOW_BACKEND_STORE_URI": "sqlite:////tmp/mlflow.db"}


def asked(port: int, path: str, body: dict[str, Any] | None = None, **headers: str) -> tuple[int, str]:
    """Ask this machine; returns status and text."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json", **headers},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - this machine
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_mlflow_in_the_image_starts_as_the_chart_says_and_answers(
    builder: images.Builder, build: Callable[[str], str], render: Render, tmp_path: Path
) -> None:
    tag = build("mlflow")
    config = config_of(builder, tag)
    assert config["User"] == "10001:10001"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    container = mlflow_container(render, port)
    environment = mlflow_settings(container)
    # The chart's own words, on the loopback of this machine.
    command = [*container["command"], *("127.0.0.1" if word == "0.0.0.0" else word for word in container["args"])]
    variables = (word for name, value in environment.items() for word in ("--env", f"{name}={value}"))
    base = ["buildah", *builder.options]
    name = local_engine.buildah(builder.options, "from", "--pull-never", tag)
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [*base, "run", "--isolation", "chroot", "--network", "host", *variables, name, "--", *command],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_ready(server, port, tmp_path / "log", "/health")
        assert asked(port, "/health")[0] == 200
        searched = {"max_results": 1}
        # By the name of a gateway, from a page that it delivered.
        origins = environment.get("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", "") or f"http://localhost:{port}"
        allowed = {"Host": HOST, "Origin": origins.split(",")[0]}
        status, text = asked(port, "/api/2.0/mlflow/experiments/search", searched, **allowed)
        assert status == 200, text
        assert json.loads(text)["experiments"][0]["name"] == "Default"
        for foreign in ({"Host": "evil.example.org"}, {"Host": HOST, "Origin": "https://evil.example.org"}):
            assert asked(port, "/api/2.0/mlflow/experiments/search", searched, **foreign)[0] == 403, foreign
        status, text = asked(port, "/metrics")
        assert status == 200
        assert "mlflow_http_request_total" in text
        check = [word.replace(":5000/", f":{port}/") for word in config["Healthcheck"]["Test"][1:]]
        assert run(builder, tag, *check, volumes=("--network", "host")).returncode == 0
    finally:
        server.terminate()
        server.wait(timeout=60)
        subprocess.run([*base, "rm", name], capture_output=True, check=False)
    # The drivers that the chart's addresses name, which a file as database does not need.
    drivers = run(builder, tag, "python", "-c", "import boto3, psycopg2, prometheus_flask_exporter")
    assert drivers.returncode == 0, drivers.stderr


def test_the_training_image_checks_its_machine_and_holds_what_steps_import(
    builder: images.Builder, build: Callable[[str], str]
) -> None:
    tag = build("train")
    config = config_of(builder, tag)
    assert config["User"] == "10001:10001"
    assert config["Cmd"] == ["nvila", "doctor"]
    said = run(builder, tag, "nvila", "version")
    assert said.returncode == 0, said.stderr
    assert tag.rpartition(":")[2] in said.stdout
    # What a machine lacks is said, with exit code 1 where `nvila run` needs it.
    checked = run(builder, tag, *config["Cmd"], "--json")
    assert checked.returncode in (0, 1), checked.stderr
    assert json.loads(checked.stdout.splitlines()[-1])["checks"]
    program = "import deepspeed, torch, transformers; print(torch.__version__, transformers.__version__)"
    versions = run(builder, tag, "python", "-c", program)
    assert versions.returncode == 0, versions.stderr
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    torch, transformers = versions.stdout.split()[-2:]
    assert f"torch=={torch.partition('+')[0]}" in constraints
    assert f"transformers=={transformers}" in constraints
    # DeepSpeed compiles with it at first use.
    assert run(builder, tag, "g++", "--version").returncode == 0


def wait_ready(server: subprocess.Popen[bytes], port: int, log: Path, path: str = "/v2/health/ready") -> None:
    """Wait for the server, or fail with its last words."""
    for _ in range(600):
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as ready:
                if ready.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(0.2)
    pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")
