"""A real Prometheus scrapes the real server and the metrics of training: every query of every dashboard has an answer.

Of a cluster there is a stand-in for what others export: kube-state-metrics and MLflow, under their names and labels.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from nvila.training.observer import StageStart, StepRecord
from nvila_platform import cost
from nvila_platform.drift.reference import build_reference
from nvila_platform.energy import Gpus
from nvila_platform.serving.client import RunningServer, start_server
from nvila_platform.settings import Settings
from nvila_platform.training import TrainingObserver
from nvila_platform.training.scrape import ScrapeSink

if TYPE_CHECKING:
    from tests.charts.conftest import Document

    Render = Callable[..., list[Document]]

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "nvila-observability"
DASHBOARDS = sorted((CHART / "files" / "dashboards").glob("*.json"))
VARIABLES = {"namespace": "models", "model_name": "eyes", "trainjob": "job", "pipeline": "run", "price": "2.5"}
# What kube-state-metrics and MLflow's exporter say; {n} grows with every scrape.
FOREIGN = """
kube_pod_status_phase{{namespace="models",pod="run-train",phase="Running"}} 1
kube_pod_status_phase{{namespace="models",pod="run-train",phase="Pending"}} 0
kube_pod_status_phase{{namespace="models",pod="run-data",phase="Failed"}} 1
kube_pod_container_status_restarts_total{{namespace="models",pod="run-train",container="main"}} {n}
kube_pod_container_status_terminated_reason{{namespace="models",pod="run-data",container="main",reason="OOMKilled"}} 1
kube_pod_completion_time{{namespace="models",pod="run-data"}} 1790000060
kube_pod_start_time{{namespace="models",pod="run-data"}} 1790000000
kube_pod_owner{{namespace="models",pod="run-train",owner_kind="Workflow",owner_name="run-x7k2p"}} 1
kube_pod_owner{{namespace="models",pod="run-data",owner_kind="Workflow",owner_name="run-x7k2p"}} 1
kube_horizontalpodautoscaler_status_current_replicas{{namespace="models",horizontalpodautoscaler="eyes-predictor"}} 1
kube_horizontalpodautoscaler_status_desired_replicas{{namespace="models",horizontalpodautoscaler="eyes-predictor"}} 2
kube_horizontalpodautoscaler_spec_max_replicas{{namespace="models",horizontalpodautoscaler="eyes-predictor"}} 4
mlflow_http_request_total{{method="POST",status="200"}} {n}
mlflow_http_request_total{{method="POST",status="500"}} {n}
mlflow_http_request_duration_seconds_bucket{{method="POST",status="200",le="0.1"}} {n}
mlflow_http_request_duration_seconds_bucket{{method="POST",status="200",le="+Inf"}} {n}
"""

# Minutes on a machine that does other things too.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class OneGpu(Gpus):
    """A GPU that takes a hundred watts."""

    def __init__(self) -> None:
        super().__init__(1)

    def joules(self) -> float:
        return 100 * time.monotonic()


@contextmanager
def others() -> Iterator[int]:
    """Offer what others export."""
    scrapes = iter(range(1_000_000))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(FOREIGN.format(n=next(scrapes)).lstrip().encode())

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


@contextmanager
def training(settings: Settings) -> Iterator[tuple[int, Callable[[int], None]]]:
    """Offer the metrics of a stage; yields the port and what makes a step."""
    curation = {
        "vqa": Counter(kept=500, dropped=480, quarantined=20),
        "charts": Counter(kept=800, dropped=199, quarantined=1),
    }
    sink = ScrapeSink("127.0.0.1:0", curation)
    with TrainingObserver([sink], settings, peak_flops=1e12, flops={"align": lambda record: 2e11}) as observer:
        observer.on_stage_start(StageStart(stage="align", steps=1000, first_step=0, parameters=7, world_size=1))

        def step(number: int) -> None:
            observer.on_step(
                StepRecord(
                    stage="align", step=number, steps=1000, loss=2.0 / number, grad_norm=0.5, lr_scale=1.0, tokens=1000,
                    samples=10, images=5, seconds=0.5, data_seconds=0.1, skipped=number % 5 == 0,
                )
            )  # fmt: skip

        yield sink.port, step


def ask(server: RunningServer, **body: Any) -> int:
    """Ask the server; returns the status."""
    request = urllib.request.Request(  # noqa: S310 - 127.0.0.1
        f"{server.base_url}/openai/v1/chat/completions",
        json.dumps({"model": "eyes", "max_tokens": 16, "temperature": 1.0, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def picture() -> str:
    import base64
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from nvila.configuration import NVILAConfig
    from nvila.modeling import NVILAForConditionalGeneration
    from nvila.processing import NVILAProcessor

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = NVILAConfig.from_preset("tiny-nvila-lite")
    NVILAForConditionalGeneration(config).save_pretrained(folder)
    NVILAProcessor.from_preset("tiny-nvila-lite").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prometheus_binary() -> str:
    beside = ROOT / ".tools" / "bin" / "prometheus"
    binary = str(beside) if beside.is_file() else shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not here: python scripts/prometheus.py")
    return binary


@contextmanager
def prometheus(binary: str, folder: Path, rules: dict[str, Any], targets: dict[str, dict[str, str]]) -> Iterator[str]:
    """Run Prometheus on targets `address -> labels`; yields its own address."""
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    jobs = [
        {"job_name": f"job-{number}", "static_configs": [{"targets": [address], "labels": labels}]}
        for number, (address, labels) in enumerate(targets.items())
    ]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def queries() -> list[tuple[str, str]]:
    """Return where and what every panel asks, with Grafana's variables filled in."""
    found = []
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            for target in panel.get("targets", []):
                text = target["expr"].replace("$__rate_interval", "5m")
                text = re.sub(r"\$(\w+)", lambda name: VARIABLES[name[1]], text)
                found.append((f"{path.stem} / {panel['title']}: {text}", text))
    return found


def answers(address: str, query: str) -> bool:
    """Whether Prometheus has a finite number for a query."""
    url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - 127.0.0.1
        result = json.load(answer)["data"]["result"]
    return any(math.isfinite(float(series["value"][1])) for series in result)


def test_every_query_of_every_dashboard_returns_data(
    render: Render,
    prometheus_binary: str,
    model_dir: Path,
    picture: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setattr(cost, "open_gpus", lambda: OneGpu())
    documents = render(CHART, extra=("--api-versions", "monitoring.coreos.com/v1"))
    (rules,) = (document["spec"] for document in documents if document["kind"] == "PrometheusRule")
    media = {"type": "image_url", "image_url": {"url": picture}}
    # An estimate of energy is made only where nothing was measured.
    build_reference([{"images": [1.0], "brightness": [0.5]}] * 20, "evaluation").write(tmp_path / "drift.json")
    drift = ("--drift", str(tmp_path / "drift.json"), "--drift-share", "1")
    asked = [(where, query) for where, query in queries() if "energy_joules_estimated" not in query]
    with (
        start_server(model_dir, "eyes", version="3", digest="sha256:" + "a" * 64, args=drift) as server,
        training(Settings.load(environ={})) as (scrape, step),
        others() as foreign,
        prometheus(
            prometheus_binary,
            tmp_path,
            rules,
            {
                server.base_url.removeprefix("http://"): {
                    "namespace": VARIABLES["namespace"], "inferenceservice": "eyes", "pod": "eyes-1"
                },
                f"127.0.0.1:{scrape}": {"namespace": VARIABLES["namespace"], "trainjob": "job", "pod": "job-0"},
                f"127.0.0.1:{foreign}": {"namespace": VARIABLES["namespace"]},
            },
        ) as address,
    ):  # fmt: skip
        silent = asked
        for number in range(1, 120):
            # Other words before one picture: the prefix is new, so the cache of media is asked.
            content = [{"type": "text", "text": f"{number}:"}, media, {"type": "text", "text": "what is it?"}]
            assert ask(server, messages=[{"role": "user", "content": content}]) == 200
            assert ask(server, messages=[{"role": "user", "content": "x " * 5000}]) == 400
            step(number)
            time.sleep(0.5)
            if number % 10 == 0:
                try:
                    silent = [(where, query) for where, query in silent if not answers(address, query)]
                except urllib.error.URLError:
                    continue
                if not silent:
                    break
        # The pictures of docs/ are of what is asked here; NVILA_UPDATE_PICTURES=1 renews them.
        pictures = ROOT / "docs" / "images" if os.environ.get("NVILA_UPDATE_PICTURES") else tmp_path / "pictures"
        said = draw_all(address, pictures)
    record_property("queries", len(asked))
    record_property("answered", len(asked) - len(silent))
    assert [where for where, _ in silent] == []
    assert len(asked) >= 60
    for path in DASHBOARDS:
        drawn = re.search(rf"dashboard-{path.stem}.png: (\d+) panels drawn, (\d+) without data(.*)", said)
        assert drawn is not None, said
        panels = [one for one in json.loads(path.read_text(encoding="utf-8"))["panels"] if one.get("targets")]
        assert int(drawn[1]) == len(panels), said
        assert (pictures / f"dashboard-{path.stem}.png").stat().st_size > 10_000


def draw_all(address: str, folder: Path) -> str:
    """Draw the dashboards of the last minutes; returns what the script says."""
    variables = [word for name, value in VARIABLES.items() for word in ("--var", f"{name}={value}")]
    command = [sys.executable, str(ROOT / "scripts" / "draw_dashboards.py"), "--prometheus", address]
    # Two minutes are shown, so rates are of less than the five that an hour of scrapes would have.
    more = ["--dest", str(folder), "--minutes", "2", "--interval", "30s"]
    done = subprocess.run([*command, *more, *variables], capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout
