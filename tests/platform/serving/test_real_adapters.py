"""Real adapters over a real model in a server process: each name answers as its folder does when it is loaded alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from nvila_platform.serving import RunningServer, start_server

# A real model and the SDK: seconds to start on a free machine, minutes on a crowded one.
pytestmark = pytest.mark.timeout(600)
METHODS = {"norms": "ln+lora", "ranks": "frozen+lora"}
QUESTIONS = ("what color is the shape ?", "is the circle red ?", "blue or red ?")
TOKENS = 12


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tiny_processor: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import torch

    from nvila.assembly import load_model
    from nvila.tuning.adapters import AdapterRecord, base_digest, prepare, save_adapter
    from nvila.tuning.methods import parse_method

    folder = tmp_path_factory.mktemp("adapters")
    for number, (name, method) in enumerate(METHODS.items()):
        model, _ = load_model(tiny_model)
        chosen = parse_method(method, rank=4)
        prepare(model, chosen, seed=number)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        record = AdapterRecord(method=chosen, base=str(tiny_model), base_digest=base_digest(tiny_model))
        save_adapter(model, tiny_processor, folder / name, record)
    return {"tiny": tiny_model, **{name: folder / name for name in METHODS}}


@pytest.fixture(scope="module")
def server(folders: dict[str, Path]) -> Iterator[RunningServer]:
    words = [word for name in METHODS for word in ("--adapter", f"{name}={folders[name]}")]
    with start_server(folders["tiny"], "tiny", args=tuple(words), timeout_s=300.0) as running:
        yield running


def alone(folder: Path) -> list[str]:
    from nvila.data.records import Message, Part
    from nvila.inference.engine import Engine, SamplingParams

    engine = Engine.load(folder)
    media: dict[str, Any] = {}
    asked = [([Message(role="user", content=(Part(type="text", value=text),))], media) for text in QUESTIONS]
    return [one.text for one in engine.generate(asked, SamplingParams(max_tokens=TOKENS, temperature=0.0))]


@pytest.mark.slow
def test_requests_of_all_names_at_once_get_the_answers_of_each_alone(
    server: RunningServer, folders: dict[str, Path]
) -> None:
    expected = {name: alone(folder) for name, folder in folders.items()}
    assert len({tuple(texts) for texts in expected.values()}) == len(expected), "all of them answer differently"
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=server.openai_url, api_key="none", max_retries=0, http_client=http) as client:
        assert {card.id for card in client.models.list().data} == set(expected)

        def ask(name: str, number: int) -> tuple[str, int, str]:
            chunks = client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": QUESTIONS[number]}],
                max_tokens=TOKENS,
                temperature=0.0,
                stream=True,
            )
            texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
            return name, number, "".join(texts)

        with ThreadPoolExecutor(len(expected) * len(QUESTIONS)) as threads:
            asked = [threads.submit(ask, name, number) for number in range(len(QUESTIONS)) for name in expected]
            answers = [one.result() for one in asked]
    assert answers == [(name, number, expected[name][number]) for name, number, _ in answers]
