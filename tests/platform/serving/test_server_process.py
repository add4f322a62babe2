"""The server as a process: what it listens on, how it starts, how it fails to, how it ends."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import psutil
import pytest

from nvila.errors import CheckpointError, ConfigError, DataError, InfrastructureError, ResourceError
from nvila_platform.serving import ChatClient, RunningServer, ask, start_server
from nvila_platform.serving.server import bind, main

StartWords = Callable[..., AbstractContextManager[RunningServer]]


def test_it_listens_on_loopback_only(server: RunningServer) -> None:
    listening = [
        connection.laddr
        for process in (psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True))
        for connection in process.connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert [(address.ip, f"http://127.0.0.1:{address.port}") for address in listening] == [
        ("127.0.0.1", server.base_url)
    ]


def test_the_client_asks_and_gets_lineage_back(server: RunningServer, png: bytes) -> None:
    answer = ask(server.base_url, "words", "what is this", png)
    assert (answer.text, answer.finish_reason) == ("30x20 what is this", "stop")
    assert (answer.model_version, answer.model_digest) == ("7", "sha256:0123456789abcdef0123")
    assert (answer.prompt_tokens, answer.image_tokens, answer.completion_tokens) == (19, 16, 4)
    assert answer.request_id
    assert 0 < answer.seconds < 20


def test_the_client_types_what_goes_wrong(server: RunningServer) -> None:
    with pytest.raises(DataError, match="not served here"):
        ask(server.base_url, "other", "hi")
    with ChatClient(server.base_url, "words") as client:
        with pytest.raises(DataError, match="not an image"):
            client.ask("hi", b"no image")
        with pytest.raises(DataError, match="9000 tokens"):
            client.ask("refuse")
    with pytest.raises(ConfigError, match="not the address"):
        ask("localhost:1", "words", "hi")


def test_a_server_that_is_gone_is_an_infrastructure_error() -> None:
    with bind("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(InfrastructureError, match="did not answer"):
        ask(url, "words", "hi")


def test_the_log_is_one_json_line_a_request(server: RunningServer, http: httpx.Client) -> None:
    http.get("/v1/models/words?x=1", headers={"x-request-id": "find-me"})
    http.get("/v2/health/ready", headers={"x-request-id": "probe"})
    # Libraries print while they are imported, before the server has set up logging; what it writes itself is JSON.
    text = server.log_path.read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line.get("request_id") == "find-me"]
    assert " 200 " in line["message"]
    assert not [line for line in lines if line.get("request_id") == "probe"]


def test_what_failed_is_in_the_log_under_its_request(server: RunningServer, http: httpx.Client) -> None:
    body = {"model": "words", "messages": [{"role": "user", "content": "crash"}]}
    answer = http.post("/openai/v1/chat/completions", json=body, headers={"x-request-id": "crash-7"})
    assert answer.status_code == 500
    assert "request id" in answer.json()["error"]["message"]
    lines = [json.loads(line) for line in server.log_path.read_text().splitlines() if line.startswith("{")]
    failed = [line["message"] for line in lines if line.get("request_id") == "crash-7" and line["level"] == "ERROR"]
    assert len(failed) == 1
    assert failed[0].startswith("request failed:")


def test_nothing_of_what_was_asked_is_in_the_log(server: RunningServer, http: httpx.Client, png: bytes) -> None:
    encoded = base64.b64encode(png).decode()
    broken = base64.b64encode(png[:40]).decode()
    parts = [{"type": "text", "text": "confidential-7311"}]
    for url, expected in ((f"data:image/png;base64,{encoded}", 200), (f"data:image/png;base64,{broken}", 400)):
        content = [*parts, {"type": "image_url", "image_url": {"url": url}}]
        body = {"model": "words", "messages": [{"role": "user", "content": content}]}
        answer = http.post("/openai/v1/chat/completions", json=body, headers={"x-request-id": "private"})
        assert answer.status_code == expected
    bad = {"model": "words", "messages": [{"role": "user", "content": "hi"}], "stop": {"confidential-7312": 1}}
    assert http.post("/openai/v1/chat/completions", json=bad).status_code == 400
    http.post("/v1/models/words:predict", json={"instances": [{"prompt": "confidential-7313"}]}).raise_for_status()
    text = server.log_path.read_text()
    assert '"private"' in text
    assert "confidential" not in text
    assert encoded[:24] not in text


def test_the_sdks_deprecations_stay_out_of_the_log(server: RunningServer, http: httpx.Client) -> None:
    http.get("/v2/models/words")
    assert "Deprecat" not in server.log_path.read_text()


def test_a_port_in_use_is_reported_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").touch()
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        began = time.monotonic()
        argv = ["--model-dir", str(tmp_path), "--name", "m", "--port", str(port)]
        code = main(argv, load=lambda _path, _adapters: pytest.fail("loaded"))
    assert code == 1
    assert time.monotonic() - began < 1.0
    error = capsys.readouterr().err
    assert f"port {port} on 127.0.0.1 is in use" in error
    assert "choose another port" in error
    assert error.count("\n") == 1


def test_a_port_in_use_comes_back_typed_from_the_process(tmp_path: Path, start_words: StartWords) -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port}"), start_words(tmp_path, port=port):
            pass


@pytest.mark.parametrize(
    ("host", "port", "says"),
    [
        ("127.0.0.1", 65536, "not a port"),
        ("no.such.host.invalid", 0, "not an address"),
        ("192.0.2.1", 0, "cannot listen"),
    ],
)
def test_unusable_addresses_are_config_errors(host: str, port: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def offline(name: str, *args: object, **options: object) -> object:
        if name.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(name, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    with pytest.raises(ConfigError, match=says):
        bind(host, port)


def test_a_missing_model_directory_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model-dir", str(tmp_path / "none"), "--name", "m", "--port", "0"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_server_that_ends_without_a_typed_error_shows_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(InfrastructureError, match="exit code 1 before it was ready") as caught,
        start_server(tmp_path, "words", module="no_such_module"),
    ):
        pass
    assert "No module named no_such_module" in caught.value.hint


def test_a_server_that_is_not_ready_in_time_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="not ready in time"), start_server(tmp_path, "words", timeout_s=0.1):
        pass


def test_until_the_model_is_loaded_it_is_alive_but_not_ready_and_then_ends_with_the_models_error(
    tmp_path: Path, start_words: StartWords
) -> None:
    (tmp_path / "damaged").touch()
    (tmp_path / "wait").touch()
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    seen: dict[str, int] = {}

    def probe() -> None:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30.0) as client:
                seen.update(_while_loading(client))
        finally:
            (tmp_path / "wait").unlink()

    prober = threading.Thread(target=probe)
    prober.start()
    with pytest.raises(CheckpointError, match="damaged") as caught, start_words(tmp_path, port=port):
        pass
    prober.join()
    assert caught.value.hint == "fetch it again"
    assert seen.pop("live") == 200
    assert seen.pop("retry-after") > 0
    assert seen == dict.fromkeys(["chat", "predict", "server-ready", "v2-ready", "v1-ready"], 503)


def _while_loading(client: httpx.Client) -> dict[str, int]:
    deadline = time.monotonic() + 60.0
    while True:
        try:
            live = client.get("/v2/health/live")
            break
        except httpx.ConnectError:
            assert time.monotonic() < deadline, "never listened"
            time.sleep(0.05)
    chat = client.post("/openai/v1/chat/completions", json={})
    return {
        "live": live.status_code,
        "server-ready": client.get("/v2/health/ready").status_code,
        "v2-ready": client.get("/v2/models/words/ready").status_code,
        "v1-ready": client.get("/v1/models/words").status_code,
        "chat": chat.status_code,
        "retry-after": int(chat.headers["retry-after"]),
        "predict": client.post("/v1/models/words:predict", json={}).status_code,
    }


def test_sigterm_finishes_running_answers_and_ends_cleanly(tmp_path: Path, start_words: StartWords) -> None:
    body = {"model": "words", "messages": [{"role": "user", "content": "slow 30"}], "stream": True}
    with start_words(tmp_path) as server:
        url = f"{server.openai_url}/chat/completions"
        with httpx.Client(trust_env=False, timeout=20.0) as client, client.stream("POST", url, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(server.pid, signal.SIGTERM)
            rest = "\n".join(lines)
            assert '" 29"' in rest
            assert rest.strip().endswith("data: [DONE]")
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.base_url, trust_env=False)
        assert psutil.Process(server.pid).wait(10.0) in (0, None)


def test_importing_the_server_imports_no_web_framework() -> None:
    code = (
        "import sys, nvila_platform.serving, nvila_platform.serving.server;"
        "print([name for name in ('kserve', 'fastapi', 'torch', 'openai') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
