"""`nvila serve` with real models: from a bucket that goes away, and with an alias that moves while it answers."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.pipelines.cli.test_cli_serve import started

from nvila_platform.artifacts import content_key, utc_now, write_manifest
from nvila_platform.registration import register_model
from nvila_platform.registry import set_alias
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, ArtifactStore, open_store

if TYPE_CHECKING:
    from tests.conftest import S3Service

# Seconds on a free machine: several starts of the real server with torch and all SDKs.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
QUESTION = "what color is the shape? blue"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one shape with weights of chance, which answer differently."""
    import torch

    from nvila.assembly import build_model, build_processor, save_model
    from nvila.configuration import NVILAConfig
    from nvila.data.tokenizers import build_word_tokenizer
    from nvila_pipelines.recipe import load_recipe

    config = load_recipe().scorer_config("small").model
    config = replace(config, language={**config.language, "initializer_range": 0.5})
    tokenizer = build_word_tokenizer([f"{QUESTION} red green circle"], model_max_length=config.max_length)
    made: dict[str, Path] = {}
    for seed in range(40):
        torch.manual_seed(seed)
        model = build_model(config, tokenizer)
        assert isinstance(model.config, NVILAConfig)
        folder = tmp_path_factory.mktemp("models") / f"model-{seed}"
        save_model(model, build_processor(model.config, tokenizer), folder)
        if text := expected(folder):
            made.setdefault(text, folder)
        if len(made) == 2:
            return list(made.values())
    raise AssertionError("no two of them say different things")


def publish(store: ArtifactStore, model: Path, *, broken: bool = False) -> ArtifactRef:
    key = content_key("train", {"model": model.name, "broken": broken}, {}, "1")
    folder = store.work_dir("train", key)
    shutil.copytree(model, folder / "model")
    if broken:
        (folder / "model" / "model.safetensors").write_bytes(b"none")
    write_manifest(folder, step="train", key=key, config={}, inputs={}, code_version="1", started_at=utc_now())
    return store.publish(folder)


def expected(model: Path) -> str:
    from nvila.data.records import Message, Part
    from nvila.inference.engine import Engine, SamplingParams

    messages = [Message(role="user", content=(Part(type="text", value=QUESTION),))]
    (answer,) = Engine.load(model).generate([(messages, {})], SamplingParams(max_tokens=8, temperature=0.0))
    return answer.text


@contextmanager
def client_of(server: Any) -> Iterator[httpx.Client]:
    ready = json.loads(server.stdout.readline())
    assert "url" in ready, ready
    with httpx.Client(base_url=ready["url"], trust_env=False, timeout=60.0) as http:
        yield http


def ask(http: httpx.Client, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, "temperature": 0}
    answer = http.post("/openai/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def text_of(answer: httpx.Response) -> str:
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120.0
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def test_an_alias_that_moves_is_followed_and_a_broken_version_is_not(models: list[Path], tmp_path: Path) -> None:
    settings = Settings.load(tmp_path / "ws", {})
    settings.workspace.mkdir()
    store = open_store(settings)
    refs = [publish(store, models[0]), publish(store, models[1]), publish(store, models[1], broken=True)]
    versions = [register_model(settings, "team", ref, run_id=None, tags={}).version for ref in refs]
    set_alias(settings, "team", "champion", versions[0])
    texts = [expected(model) for model in models]
    assert texts[0] != texts[1]
    words = ("serve", "models:/team@champion", "--port", "0", "--json", "--update-interval", "0.3")
    with started(*words, "--workspace", "ws", cwd=tmp_path) as server, client_of(server) as http:
        assert text_of(ask(http, "team")) == texts[0]
        set_alias(settings, "team", "champion", versions[1])
        until(lambda: ask(http, "team").headers["x-nvila-model-version"] == str(versions[1]))
        answer = ask(http, "team")
        assert text_of(answer) == texts[1]
        assert answer.headers["x-nvila-model-digest"] == refs[1].digest
        assert answer.json()["system_fingerprint"].startswith(f"v{versions[1]}-")
        set_alias(settings, "team", "champion", versions[2])
        until(lambda: http.get("/health").json()["update"]["state"] == "failed")
        update = http.get("/health").json()["update"]
        assert (update["version"], update["error"]) == (str(versions[2]), "checkpoint")
        assert text_of(ask(http, "team")) == texts[1]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def test_a_bucket_serves_a_model_and_is_not_needed_again(
    models: list[Path], tmp_path: Path, mortal_s3: S3Service
) -> None:
    ref = publish(
        open_store(Settings.load(tmp_path / "ws", mortal_s3.variables | {"NVILA_STORE_URI": "s3://models/pre"})),
        models[0],
    )
    address = f"s3://models/pre/content/{ref.digest}"
    words = ("serve", address, "--port", "0", "--json")
    text = expected(models[0])

    def serve(workspace: str) -> Any:
        return started(*words, "--workspace", workspace, cwd=tmp_path, variables=mortal_s3.variables)

    with serve("one") as server, client_of(server) as http:
        mortal_s3.kill()
        answer = ask(http, "nvila")
        assert (text_of(answer), answer.headers["x-nvila-model-digest"]) == (text, ref.digest)
    with serve("one") as server, client_of(server) as http:
        assert text_of(ask(http, "nvila")) == text, "a sound copy needs no bucket"
    with (
        (tmp_path / "errors").open("w") as errors,
        started(*words, "--workspace", "two", cwd=tmp_path, variables=mortal_s3.variables, errors=errors) as server,
    ):
        assert server.wait(120) == 75
    lines = [line for line in (tmp_path / "errors").read_text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "the S3 service cannot be reached" in lines[0]
