"""Adapters over HTTP: listed with their parent, selected by name in every protocol, named in the answer's headers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import httpx
import openai
import pytest

from nvila.errors import ConfigError
from nvila_platform.serving import RunningServer
from nvila_platform.serving.identity import ModelIdentity
from nvila_platform.serving.served import Version
from nvila_platform.serving.source import parse_adapters

StartWords = Callable[..., AbstractContextManager[RunningServer]]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, start_words: StartWords) -> Iterator[RunningServer]:
    base = tmp_path_factory.mktemp("base")
    args: list[str] = []
    for name in ("red", "blue"):
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").touch()
        (folder / "greeting").write_text(f"I-am-{name}")
        args += ["--adapter", f"{name}={folder}"]
    with start_words(base, version="7", digest="sha256:base", args=tuple(args)) as running:
        yield running


def test_they_are_listed_with_their_parent_and_selected_by_name(adapted: RunningServer) -> None:
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=adapted.openai_url, api_key="none", max_retries=0, http_client=http) as client:
        cards = {card.id: card.model_extra or {} for card in client.models.list().data}
        assert {name: card["parent"] for name, card in cards.items()} == {
            "words": None,
            "red": "words",
            "blue": "words",
        }
        for name, says in (("words", "hello"), ("red", "I-am-red"), ("blue", "I-am-blue")):
            raw = client.chat.completions.with_raw_response.create(
                model=name, messages=[{"role": "user", "content": "greet"}]
            )
            answer = raw.parse()
            assert (answer.choices[0].message.content, answer.model) == (says, name)
            digest = "sha256:base" if name == "words" else "unknown"
            assert raw.headers["x-nvila-model-digest"] == digest
            assert client.completions.create(model=name, prompt="greet").choices[0].text == says
        assert client.models.retrieve("red").id == "red"
        with pytest.raises(openai.NotFoundError, match="did you mean 'blue'"):
            client.chat.completions.create(model="bleu", messages=[{"role": "user", "content": "greet"}])


def test_both_inference_protocols_know_them(adapted: RunningServer) -> None:
    with httpx.Client(base_url=adapted.base_url, trust_env=False, timeout=20.0) as http:
        v1 = http.post("/v1/models/red:predict", json={"instances": [{"prompt": "greet"}]})
        assert v1.json()["predictions"][0]["text"] == "I-am-red"
        tensor = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["greet"]}
        v2 = http.post("/v2/models/blue/infer", json={"inputs": [tensor]})
        assert (v2.json()["outputs"][0]["data"], v2.json()["model_name"]) == (["I-am-blue"], "blue")
        assert v2.headers["x-nvila-model-digest"] == "unknown"
        assert http.get("/v2/models/blue/ready").json()["ready"] is True
        assert http.post("/v1/models/green:predict", json={"instances": [{"prompt": "greet"}]}).status_code == 404


@pytest.mark.parametrize("words", [["red"], ["=x"], ["red="], ["red=a", "red=b"]])
def test_words_that_name_no_adapter(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"is not NAME=ADDRESS|two adapters are named 'red'"):
        parse_adapters(words)


def test_an_adapter_needs_a_name_of_its_own() -> None:
    one = ModelIdentity(name="words")
    with pytest.raises(ConfigError, match="two models are named 'words'"):
        Version(identity=one, adapters=(one,))
