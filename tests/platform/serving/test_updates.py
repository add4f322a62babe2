"""Another version in the place of the served one: streams go on, what is broken changes nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from nvila.errors import ConfigError, InfrastructureError
from nvila_platform.artifacts import content_key, read_manifest, utc_now, write_manifest
from nvila_platform.serving import RunningServer
from nvila_platform.serving.identity import ModelIdentity
from nvila_platform.serving.limits import Limits
from nvila_platform.serving.metrics import ServingMetrics
from nvila_platform.serving.served import Served, Version
from nvila_platform.serving.server import main
from nvila_platform.serving.service import ChatService
from nvila_platform.serving.source import Fetched, Plan
from nvila_platform.serving.updates import UpdateOptions, Updater

StartWords = Callable[..., AbstractContextManager[RunningServer]]


def publish(place: Path, number: int, *, broken: str = "") -> str:
    """Put another finished folder where the model is, in one step; return its digest."""
    folder = place.with_name(f"version-{number}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").touch()
    (folder / "greeting").write_text(f"version-{number}")
    (folder / "model.safetensors").write_bytes(bytes(2**20))
    if broken == "engine":
        (folder / "mute").touch()
    key = content_key("quantize", {"number": number, "broken": broken}, {}, "1")
    write_manifest(folder, step="quantize", key=key, config={}, inputs={}, code_version="1", started_at=utc_now())
    if broken == "file":
        (folder / "greeting").write_text("version-X")
    link = place.with_name("next")
    link.symlink_to(folder)
    link.rename(place)
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest.digest


class Client:
    """Asks a server, and reads its metrics and state."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def ask(self, text: str, model: str = "words", **options: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **options}
        return self.http.post("/openai/v1/chat/completions", json=body)

    def answer(self, text: str, model: str = "words") -> tuple[str, str]:
        response = self.ask(text, model)
        return response.json()["choices"][0]["message"]["content"], response.headers["x-nvila-model-digest"]

    def metric(self, name: str) -> float:
        text = self.http.get("/metrics").text
        (line,) = [line for line in text.splitlines() if line.startswith(f"nvila:{name}")]
        return float(line.rpartition(" ")[2])

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/health").json()
        return found


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_new_requests_get_the_new_version_and_old_streams_end_on_the_old_one(
    tmp_path: Path, start_words: StartWords
) -> None:
    place = tmp_path / "model"
    first = publish(place, 1)
    with (
        start_words(place, args=("--update-interval", "0.1")) as server,
        httpx.Client(base_url=server.base_url, trust_env=False, timeout=30.0) as http,
    ):
        client = Client(http)
        assert client.answer("greet") == ("version-1", first)
        body = {"model": "words", "messages": [{"role": "user", "content": "slow 60"}], "stream": True}
        with (
            httpx.Client(trust_env=False, timeout=30.0) as other,
            other.stream("POST", f"{server.openai_url}/chat/completions", json=body) as old,
        ):
            lines = old.iter_lines()
            next(lines)
            second = publish(place, 2)
            until(lambda: client.health()["digest"] == second)
            assert client.metric("models_loaded") == 2
            assert client.answer("greet") == ("version-2", second)
            rest = "\n".join(lines)
        assert '" 59"' in rest
        assert rest.strip().endswith("data: [DONE]")
        assert old.headers["x-nvila-model-digest"] == first != second
        until(lambda: client.metric("models_loaded") == 1)
        assert client.metric('model_updates_total{model_name="words",outcome="updated"}') == 1
        assert client.metric("model_info") == 1
        assert f'digest="{second}"' in http.get("/metrics").text
        # With no stream on it, the old version goes at once.
        third = publish(place, 3)
        until(lambda: client.answer("greet") == ("version-3", third))
        until(lambda: client.metric("models_loaded") == 1)


@pytest.mark.parametrize("broken", ["file", "engine"])
def test_a_broken_version_leaves_the_old_one_serving(tmp_path: Path, start_words: StartWords, broken: str) -> None:
    place = tmp_path / "model"
    first = publish(place, 1)
    with (
        start_words(place, args=("--update-interval", "0.1")) as server,
        httpx.Client(base_url=server.base_url, trust_env=False, timeout=30.0) as http,
    ):
        client = Client(http)
        assert client.health()["update"] == {"state": "current"}
        second = publish(place, 2, broken=broken)
        until(lambda: client.health()["update"]["state"] == "failed")
        error = "artifact" if broken == "file" else "failed"
        expected = {"state": "failed", "error": error, "version": "unregistered", "digest": second}
        assert client.health()["update"] == expected
        failed = 'model_updates_total{model_name="words",outcome="failed"}'
        assert (client.metric("model_update_failing"), client.metric(failed)) == (1, 1)
        time.sleep(0.5)
        assert client.metric(failed) == 1, "a version that does not work is tried once"
        os.kill(server.pid, signal.SIGHUP)
        until(lambda: client.metric(failed) == 2)
        assert client.answer("greet") == ("version-1", first)
        assert "version unregistered serves on" in server.log_path.read_text()
        third = publish(place, 3)
        until(lambda: client.answer("greet") == ("version-3", third))
        until(lambda: client.health()["update"] == {"state": "current"})
        assert client.metric("model_update_failing") == 0


def test_a_version_that_does_not_fit_into_the_budget_is_refused_with_the_figures(
    tmp_path: Path, start_words: StartWords
) -> None:
    place = tmp_path / "model"
    first = publish(place, 1)
    with (
        start_words(place, args=("--memory-gib", "0.01")) as server,
        httpx.Client(base_url=server.base_url, trust_env=False, timeout=30.0) as http,
    ):
        client = Client(http)
        publish(place, 2)
        time.sleep(0.3)
        assert client.answer("greet") == ("version-1", first), "nobody looks without an interval or a signal"
        os.kill(server.pid, signal.SIGHUP)
        until(lambda: client.health()["update"]["state"] == "no_memory")
        assert client.metric('model_updates_total{model_name="words",outcome="no_memory"}') == 1
        assert client.answer("greet") == ("version-1", first)
        assert "the budget is 0.01 GiB" in server.log_path.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"interval_s": -1.0}, "update interval is -1"),
        ({"interval_s": float("nan")}, "update interval is nan"),
        ({"memory_gib": 0.0}, "--memory-gib is 0"),
    ],
)
def test_numbers_that_cannot_be_used(arguments: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        UpdateOptions(**arguments)


def test_a_folder_whose_changes_nobody_could_see_is_not_watched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").touch()
    argv = ["--model-dir", str(tmp_path), "--name", "words", "--port", "0", "--update-interval", "5"]
    assert main(argv) == 2
    assert f"{tmp_path} has no manifest.json, so that no change of it is seen" in capsys.readouterr().err


class Away:
    """A registry that cannot be reached."""

    def look(self) -> Plan:
        raise InfrastructureError("the registry does not answer", "try again later")

    def fetch(self, plan: Plan) -> Fetched:
        raise AssertionError

    def load(self, fetched: Fetched) -> Served:
        raise AssertionError


def test_a_registry_that_is_away_is_told_once_and_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    version = Version(identity=ModelIdentity(name="words", version="4"))
    service = ChatService(version, Limits(), ServingMetrics(version.identity, registry))
    try:
        updater = Updater(service, Away(), UpdateOptions(), cache_bytes=lambda: 0, registry=registry)
        with caplog.at_level("ERROR"):
            assert [updater.check() for _ in range(3)] == ["unreachable"] * 3
        assert [record.message for record in caplog.records] == [
            "the model is not put in place, version 4 serves on: the registry does not answer (try again later)"
        ]
        assert updater.status() == {"state": "unreachable", "error": "infrastructure"}
        labels = {"model_name": "words", "outcome": "unreachable"}
        assert registry.get_sample_value("nvila:model_updates_total", labels) == 3
    finally:
        service.close()


def test_a_replaced_engine_is_freed_when_its_last_answer_ends(words: ModuleType) -> None:
    from nvila.data.records import vqa_sample
    from nvila.inference.engine import SamplingParams

    registry = CollectorRegistry()
    version = Version(identity=ModelIdentity(name="words"))
    service = ChatService(version, Limits(), ServingMetrics(version.identity, registry))
    sample = vqa_sample(id="1", source="test", image=None, question="slow 5", answer=None)
    freed: list[bool] = []

    async def check() -> weakref.ref[Any]:
        engine = words.WordsEngine()
        gone = weakref.ref(engine)
        service.start(Served(version, engine), registry)
        del engine
        with service.queue.admit() as slot:
            stream = slot.submit(sample.messages, {}, SamplingParams())
            await stream.opened()
            service.replace(Served(version, words.WordsEngine()), lambda: freed.append(True))
            gc.collect()
            assert gone() is not None
            assert not freed
            assert (await stream.collected()).text == "0 1 2 3 4"
        return gone

    try:
        gone = asyncio.run(check())
        assert freed == [True]
        until(lambda: bool(gc.collect() or True) and gone() is None)
    finally:
        service.close()
