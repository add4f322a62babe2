"""What is asked of Prometheus: its own evaluation of the queries, and what becomes of the answers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from nvila.errors import ConfigError, InfrastructureError
from nvila_platform.cluster.inference_service import load_query
from nvila_platform.prometheus import Prometheus
from nvila_platform.rollout.live_metrics import LiveMetrics

ROOT = Path(__file__).resolve().parents[3]
NEW, OLD = "eye-v2-aaaaaa-predictor-.+", "eye-v1-bbbbbb-predictor-.+"
ASKED = LiveMetrics(Prometheus("http://127.0.0.1:1"), "models", "eye")


@pytest.fixture(scope="module")
def promtool() -> str:
    fetched = ROOT / ".tools" / "bin" / "promtool"
    found = str(fetched) if fetched.is_file() else shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not here: python scripts/prometheus.py")
    return found


def series(metric: str, pod: str, values: str, **labels: str) -> dict[str, str]:
    marks = {"namespace": "models", "model_name": "eye", "pod": pod} | labels
    return {
        "series": metric + "{" + ",".join(f'{key}="{value}"' for key, value in marks.items()) + "}",
        "values": values,
    }


def evaluated(promtool: str, tmp_path: Path, query: str, value: float | None, inputs: list[dict[str, str]]) -> str:
    """Let Prometheus' own tool evaluate a query after ten minutes of scrapes."""
    expected = [] if value is None else [{"labels": "{}", "value": value}]
    test = {
        "interval": "30s",
        "input_series": inputs,
        "promql_expr_test": [{"expr": query, "eval_time": "10m", "exp_samples": expected}],
    }
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [], "evaluation_interval": "30s", "tests": [test]}))
    done = subprocess.run(
        [promtool, "test", "rules", str(file)], capture_output=True, text=True, check=False, timeout=60
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def pod(revision: str, number: int = 0) -> str:
    return f"eye-{revision}-predictor-6f7d-x{number}"


def test_answers_of_the_new_pods_are_counted(promtool: str, tmp_path: Path) -> None:
    # Five more with every scrape; the window of 300 s holds ten of them.
    inputs = [
        series("nvila:request_success_total", pod("v2-aaaaaa"), "0+5x20", finished_reason="stop"),
        series("nvila:request_success_total", pod("v2-aaaaaa", 1), "0+5x20", finished_reason="length"),
        series("nvila:request_success_total", pod("v1-bbbbbb"), "0+500x20", finished_reason="stop"),
        series("nvila:request_success_total", pod("v2-aaaaaa"), "0+9x20", finished_reason="stop", model_name="ear"),
        series("nvila:request_success_total", pod("v2-aaaaaa"), "0+9x20", finished_reason="stop", namespace="other"),
    ]
    assert evaluated(promtool, tmp_path, ASKED.answered(NEW, 300), 100, inputs) == ""


def test_failures_of_a_series_that_is_new_are_counted_from_the_first(promtool: str, tmp_path: Path) -> None:
    # `increase` alone would not see the step from nothing to the first value.
    inputs = [series("nvila:request_rejected_total", pod("v2-aaaaaa"), "_x14 3 3 4 4 4 4 4", reason="internal_error")]
    assert evaluated(promtool, tmp_path, ASKED.failed(NEW, 300), 4, inputs) == ""


def test_mistakes_of_clients_are_no_failures(promtool: str, tmp_path: Path) -> None:
    inputs = [
        series("nvila:request_rejected_total", pod("v2-aaaaaa"), "0+2x20", reason="invalid_image"),
        series("nvila:request_rejected_total", pod("v2-aaaaaa"), "0+2x20", reason="model_not_found"),
        series("nvila:request_rejected_total", pod("v2-aaaaaa"), "0+1x20", reason="queue_full"),
    ]
    assert evaluated(promtool, tmp_path, ASKED.failed(NEW, 300), 10, inputs) == ""


def test_the_percentile_is_that_of_one_revision(promtool: str, tmp_path: Path) -> None:
    def buckets(revision: str, fast: str, slow: str) -> list[dict[str, str]]:
        name = "nvila:time_to_first_token_seconds_bucket"
        return [series(name, pod(revision), values, le=le) for le, values in (("1", fast), ("2", slow), ("+Inf", slow))]

    inputs = buckets("v2-aaaaaa", "0+0x20", "0+10x20") + buckets("v1-bbbbbb", "0+10x20", "0+10x20")
    assert evaluated(promtool, tmp_path, ASKED.first_token(NEW, 300), 1.95, inputs) == ""
    assert evaluated(promtool, tmp_path, ASKED.first_token(OLD, 300), 0.95, inputs) == ""
    assert evaluated(promtool, tmp_path, ASKED.first_token("eye-v3-.+", 300), None, inputs) == ""


def test_the_autoscaler_gets_means_of_two_minutes_over_all_pods(promtool: str, tmp_path: Path) -> None:
    def gauge(name: str, number: int, values: str) -> dict[str, str]:
        return series(f"nvila:{name}", pod("v1-aaaaaa", number), values)

    # A crowd in one scrape of four is two of the nine points of the mean.
    inputs = [
        gauge("num_requests_running", 0, "4x17 12 4x9"),
        gauge("num_requests_waiting", 0, "1x30"),
        gauge("num_requests_running", 1, "2x30"),
        gauge("num_requests_waiting", 1, "0x30"),
        gauge("visual_load_tokens", 0, "1000x30"),
        gauge("visual_load_tokens", 1, "500x30"),
    ]
    of = ("eye", "models")
    assert evaluated(promtool, tmp_path, load_query("requests", *of), 7 + 8 * 2 / 9, inputs) == ""
    assert evaluated(promtool, tmp_path, load_query("visual_load", *of), 1500, inputs) == ""
    # No request in two minutes, and so no percentile: nothing to scale for, and no failure either.
    name = "nvila:time_to_first_token_seconds_bucket"
    idle = [series(name, pod("v1-aaaaaa"), "7x30", le=le) for le in ("1", "+Inf")]
    assert evaluated(promtool, tmp_path, load_query("ttft", *of), 0, inputs + idle) == ""
    busy = [series(name, pod("v1-aaaaaa"), "0+7x30", le=le) for le in ("1", "+Inf")]
    assert evaluated(promtool, tmp_path, load_query("ttft", *of), 1.9, inputs + busy) == ""


def test_a_wrong_expectation_is_noticed(promtool: str, tmp_path: Path) -> None:
    inputs = [series("nvila:request_success_total", pod("v2-aaaaaa"), "0+5x20", finished_reason="stop")]
    assert "exp" in evaluated(promtool, tmp_path, ASKED.answered(NEW, 300), 51, inputs)


class Said(ThreadingHTTPServer):
    status = 200
    body = b""


class Handler(BaseHTTPRequestHandler):
    server: Said

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.body)


@pytest.fixture
def said() -> Iterator[Said]:
    server = Said(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def asked(said: Said) -> Prometheus:
    return Prometheus(f"http://127.0.0.1:{said.server_address[1]}/")


def result(*values: str) -> bytes:
    found = [{"metric": {}, "value": [0, value]} for value in values]
    return json.dumps({"status": "success", "data": {"result": found}}).encode()


@pytest.mark.parametrize(
    ("values", "found"), [(("2.5",), 2.5), ((), None), (("NaN",), None), (("+Inf",), float("inf"))]
)
def test_answers_become_numbers(said: Said, values: tuple[str, ...], found: float | None) -> None:
    said.body = result(*values)
    assert asked(said).value("up") == found


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (400, b"parse error", ConfigError, "refuses: 400 parse error"),
        (401, b"who are you", ConfigError, "refuses: 401"),
        (503, b"", InfrastructureError, "failed with 503"),
        (200, b"<html>", InfrastructureError, "does not answer"),
        (200, b"{}", InfrastructureError, "does not answer"),
        (200, result("1", "2"), ConfigError, "gives 2 numbers"),
    ],
)
def test_what_is_no_number_is_typed(said: Said, status: int, body: bytes, error: type[Exception], message: str) -> None:
    said.status, said.body = status, body
    with pytest.raises(error, match=message):
        asked(said).value("up")


def test_a_prometheus_that_is_away_is_worth_another_try(said: Said) -> None:
    there = asked(said)
    said.shutdown()
    said.server_close()
    with pytest.raises(InfrastructureError, match="does not answer"):
        there.value("up")


@pytest.mark.parametrize("url", ["prometheus:9090", "file:///etc/passwd", "http://", ""])
def test_an_address_has_to_be_one(url: str) -> None:
    with pytest.raises(ConfigError, match="no address of Prometheus"):
        Prometheus(url)


def test_two_revisions_are_measured_side_by_side(kserve_controller: ModuleType) -> None:
    users = kserve_controller.Users(ok=90, failed=10, ttft_s=0.5, of={"v1": {"ttft_s": 0.25}})
    with kserve_controller.prometheus(users) as address:
        found = LiveMetrics(Prometheus(address, "key"), "models", "eye").measure((NEW, OLD), 5)
        users.ok = users.failed = 0
        users.ttft_s = None
        nothing = LiveMetrics(Prometheus(address), "models", "eye").measure((NEW, OLD), 500.4)
    assert (found.requests, found.error_rate) == (100, 0.1)
    assert (found.ttft_p95_ms, found.live_ttft_p95_ms) == (500, 250)
    assert (nothing.requests, nothing.error_rate, nothing.ttft_p95_ms) == (0, None, None)
    # Less than a minute shows nothing; longer windows are those of the step.
    assert "[60s]" in users.queries[0]
    assert "[500s]" in users.queries[-1]
    assert users.tokens[0] == "Bearer key"
    assert users.tokens[-1] == ""


def test_answers_that_were_not_in_time_are_failures(promtool: str, tmp_path: Path) -> None:
    inputs = [
        series("nvila:request_success_total", pod("v2-aaaaaa"), "0+5x20", finished_reason="abort"),
        series("nvila:request_rejected_total", pod("v2-aaaaaa"), "0+5x20", reason="timeout"),
    ]
    assert evaluated(promtool, tmp_path, ASKED.answered(NEW, 300), None, inputs) == ""
    assert evaluated(promtool, tmp_path, ASKED.failed(NEW, 300), 50, inputs) == ""


def test_every_fault_is_a_reason_that_the_server_can_give() -> None:
    from nvila.errors import ERRORS
    from nvila_platform.rollout.live_metrics import FAULTS

    serving = "\n".join(path.read_text("utf-8") for path in (ROOT / "platform/nvila_platform/serving").glob("*.py"))
    for reason in FAULTS:
        assert reason in ERRORS or f'"{reason}"' in serving, reason


def test_every_refusal_that_is_not_a_clients_fault_is_a_fault() -> None:
    from nvila_platform.rollout.live_metrics import FAULTS

    serving = "\n".join(path.read_text("utf-8") for path in (ROOT / "platform/nvila_platform/serving").glob("*.py"))
    given = re.findall(r'ApiError\(\s*(\d+),\s*"(\w+)"', serving)
    assert len(given) > 40
    # A caller with a key asks more often than its key may.
    ours = {code for status, code in given if int(status) >= 500 or status == "429"} - {"rate_limited"}
    assert {"timeout", "queue_full"} <= ours
    assert ours <= set(FAULTS)
