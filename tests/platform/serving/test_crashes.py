"""What clients see when the server dies, and what its operator sees when its files are damaged."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from nvila.errors import ArtifactError
from nvila_platform.artifacts import content_key, utc_now, write_manifest
from nvila_platform.serving import RunningServer, ask

StartWords = Callable[..., AbstractContextManager[RunningServer]]
BODY = {"model": "words", "messages": [{"role": "user", "content": "slow 100"}], "stream": True}


def test_after_a_kill_in_mid_stream_nobody_takes_the_text_as_complete_and_the_next_server_takes_the_port(
    tmp_path: Path, start_words: StartWords
) -> None:
    with start_words(tmp_path) as server:
        url = f"{server.openai_url}/chat/completions"
        with httpx.Client(trust_env=False, timeout=20.0) as client, client.stream("POST", url, json=BODY) as answer:
            lines = answer.iter_lines()
            seen = [next(lines) for _ in range(6)]
            os.kill(server.pid, signal.SIGKILL)
            with pytest.raises(httpx.RemoteProtocolError):
                seen += list(lines)
        assert not any("[DONE]" in line or '"finish_reason":"stop"' in line for line in seen)
        assert psutil.Process(server.pid).wait(10.0) in (-signal.SIGKILL, None)
        port = int(server.base_url.rpartition(":")[2])
    with start_words(tmp_path, port=port) as again:
        assert ask(again.base_url, "words", "hello you").text == "hello you"


def test_a_stream_that_outlives_the_grace_ends_with_an_error_and_not_as_complete(
    tmp_path: Path, start_words: StartWords
) -> None:
    with start_words(tmp_path, args=("--grace", "1")) as server:
        url = f"{server.openai_url}/chat/completions"
        with httpx.Client(trust_env=False, timeout=30.0) as client, client.stream("POST", url, json=BODY) as answer:
            lines = answer.iter_lines()
            seen = [next(lines)]
            os.kill(server.pid, signal.SIGTERM)
            with suppress(httpx.RemoteProtocolError):
                seen += list(lines)
        assert not any("[DONE]" in line for line in seen)
        assert psutil.Process(server.pid).wait(20.0) in (0, None)


def test_a_damaged_file_is_found_by_its_digest_before_it_is_loaded_and_named_in_one_line(
    tmp_path: Path, start_words: StartWords
) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "greeting").write_text("hello")
    key = content_key("train", {}, {}, "1")
    write_manifest(tmp_path, step="train", key=key, config={}, inputs={}, code_version="1", started_at=utc_now())
    damaged = bytearray(1000)
    damaged[500] ^= 1
    (tmp_path / "model.safetensors").write_bytes(damaged)
    log = tmp_path.with_name("server.log")
    with (
        pytest.raises(ArtifactError, match=r"model\.safetensors: sha256 .*, the manifest says") as caught,
        start_words(tmp_path, log_path=log),
    ):
        pass
    assert caught.value.hint
    lines = [line for line in log.read_text().splitlines() if "sha256" in line]
    assert len(lines) == 1
    assert "Traceback" not in log.read_text()
    assert not [line for line in log.read_text().splitlines() if line.startswith("{") and _ready(line)]


def _ready(line: str) -> bool:
    return "is ready" in str(json.loads(line).get("message", ""))
