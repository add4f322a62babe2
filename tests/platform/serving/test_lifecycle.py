"""How a server says what state it is in, and how it leaves: not ready, then closed, then gone."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from nvila_platform.serving import RunningServer


def test_health_names_the_model_and_its_state(http: httpx.Client) -> None:
    answer = http.get("/health")
    assert (answer.status_code, answer.json()["state"], answer.json()["model"]) == (200, "ready", "words")
    assert answer.json()["version"] == "7"


def test_before_the_port_closes_it_is_not_ready_but_answers(tmp_path: Path, start_words: Any) -> None:
    body = {"model": "words", "messages": [{"role": "user", "content": "slow 60"}], "stream": True}
    with (
        start_words(tmp_path, args=("--drain", "1.5")) as server,
        httpx.Client(base_url=server.base_url, trust_env=False, timeout=20.0) as client,
    ):
        done: list[str] = []
        thread = threading.Thread(
            target=lambda: done.append(client.post("/openai/v1/chat/completions", json=body).text)
        )
        thread.start()
        time.sleep(0.3)
        os.kill(server.pid, signal.SIGTERM)
        wait_for(lambda: client.get("/v2/health/ready").status_code == 503)
        assert client.get("/health").json()["state"] == "draining"
        assert client.get("/v2/health/live").status_code == 200
        late = {"model": "words", "messages": [{"role": "user", "content": "late"}]}
        assert client.post("/openai/v1/chat/completions", json=late).status_code == 200
        thread.join()
        assert done[0].rstrip().endswith("data: [DONE]")
        assert psutil.Process(server.pid).wait(20.0) in (0, None)


def test_a_second_signal_closes_at_once(tmp_path: Path, start_words: Any) -> None:
    with start_words(tmp_path, args=("--drain", "60")) as server:
        os.kill(server.pid, signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{server.base_url}/health", trust_env=False).status_code == 503)
        os.kill(server.pid, signal.SIGTERM)
        assert psutil.Process(server.pid).wait(10.0) in (0, None)


def test_a_killed_server_leaves_no_decoders(tmp_path: Path, start_words: Any) -> None:
    with start_words(tmp_path) as server:
        wait_for(lambda: len(decoders(server)) == 2)
        left = decoders(server)
        os.kill(server.pid, signal.SIGKILL)
        wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in left))


def decoders(server: RunningServer) -> list[psutil.Process]:
    children = psutil.Process(server.pid).children(recursive=True)
    return [one for one in children if "decode_worker" in " ".join(one.cmdline())]


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20.0
    while True:
        try:
            if condition():
                return
        except psutil.NoSuchProcess:
            return
        if time.monotonic() > deadline:
            pytest.fail("waited too long")
        time.sleep(0.05)
