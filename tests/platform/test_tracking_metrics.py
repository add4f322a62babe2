"""Metrics reach MLflow the same way through its client and over its REST interface."""

from __future__ import annotations

import base64
import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from nvila_platform import mlflow_backend
from nvila_platform.mlflow_ui import start_ui
from nvila_platform.settings import Settings
from nvila_platform.tracking_buffer import Event, Outbox, RunSpec
from nvila_platform.tracking_metrics import values_of, values_sender
from nvila_platform.tracking_sink import open_sink

HISTORIES = {
    "loss": [0.1 + 0.2, 1e-300, -2.5],
    "odd": [math.nan, math.inf, -math.inf],
    "acc@1 (%)": [3.0, 4.0, 5.0],
}


def events() -> list[Event]:
    return [
        Event(kind="metrics", values={name: history[step] for name, history in HISTORIES.items()}, step=step)
        for step in range(3)
    ]


def stored(client: Any, run_id: str) -> dict[str, list[tuple[int, int, float]]]:
    histories = {name: client.get_metric_history(run_id, name) for name in ("loss", "odd", "acc_1 ___")}
    return {name: [(p.step, p.timestamp, p.value) for p in history] for name, history in histories.items()}


def test_a_server_holds_what_the_client_would_have_sent(tracked: Settings) -> None:
    local = mlflow_backend.connect(tracked)
    with start_ui(tracked, port=0) as server:
        remote = mlflow_backend.connect(replace(tracked, tracking_uri=server.url))
        found = []
        sent = events()
        for client in (local, remote):
            run_id = open_sink(client, tracked, RunSpec(name="run", experiment="same"), may_exist=False).run_id
            values_sender(client, run_id)(values_of(sent))
            found.append(stored(local, run_id))
    by_client, by_rest = found
    assert [value for _, _, value in by_rest["loss"]] == HISTORIES["loss"]
    assert [value for _, _, value in by_rest["acc_1 ___"]] == HISTORIES["acc@1 (%)"]
    # NaN equals nothing, and databases hold infinity as their largest number: what counts is that both are the same.
    assert repr(by_rest) == repr(by_client)


@pytest.mark.slow
def test_what_a_server_refuses_is_left_out_and_what_fails_is_raised(
    tracked: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.exceptions import MlflowException

    with start_ui(tracked, port=0) as server:
        client = mlflow_backend.connect(replace(tracked, tracking_uri=server.url))
        sink = open_sink(client, tracked, RunSpec(name="run", experiment="e"), may_exist=False)
        sink.send([Event(kind="metrics", values={"a": 1.0})])
        client.delete_run(sink.run_id)
        sink.send([Event(kind="metrics", values={"b": 2.0, "c": 3.0})])
        assert client.get_run(sink.run_id).data.metrics == {"a": 1.0}
        refused = [text for text in caplog.messages if text.startswith("MLflow refused Value(name=")]
        assert [text[len("MLflow refused Value(name=") :][:3] for text in refused] == ["'b'", "'c'"]
    with pytest.raises(MlflowException):
        sink.send(events())


@pytest.fixture
def requests_seen() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Give the address of a server that takes everything, and the credentials and bodies that it got."""
    seen: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            seen.append((self.headers.get("authorization", ""), json.loads(body)))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: object) -> None:
            """Stay silent."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("environment", "header"),
    [
        ({"MLFLOW_TRACKING_TOKEN": "abc"}, "Bearer abc"),
        (
            {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "pw"},
            "Basic " + base64.b64encode(b"me:pw").decode(),
        ),
    ],
    ids=["token", "password"],
)
def test_credentials_are_those_of_the_client(
    environment: dict[str, str],
    header: str,
    requests_seen: tuple[str, list[tuple[str, Any]]],
    tracked: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    address, seen = requests_seen
    client = mlflow_backend.connect(replace(tracked, tracking_uri=address))
    values_sender(client, "abc")(values_of([Event(kind="metrics", values={"loss": 0.5}, step=7, time_ms=1)]))
    body = {"run_id": "abc", "metrics": [{"key": "loss", "value": 0.5, "timestamp": 1, "step": 7}]}
    assert seen == [(header, body)]


def test_a_request_leaves_when_its_values_are_there_and_not_before() -> None:
    """Two events of 500 values fill a request; fewer wait for company."""
    outbox = Outbox()
    half = Event(kind="metrics", values={str(number): 0.0 for number in range(500)})
    woken = threading.Event()

    def wait() -> None:
        outbox.wait(gather_s=60, idle_s=60)
        woken.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    outbox.put(half)
    assert not woken.wait(0.3)
    outbox.put(half)
    assert woken.wait(10)
    waiting.join()
    began = time.monotonic()
    assert outbox.wait(gather_s=60, idle_s=60)
    assert time.monotonic() - began < 10
