"""Adapters in one engine: each answers as it does alone, and nothing passes from one to another."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.model.tuning.test_adapters import make

from nvila.assembly import load_model
from nvila.data.records import Message, Part
from nvila.errors import CapabilityError, CheckpointError, ConfigError
from nvila.inference.config import EngineConfig
from nvila.inference.engine import Engine, Generation, SamplingParams
from nvila.inference.load import Prompt, run_generate
from nvila.tuning.four_bit import FourBitLinear

if TYPE_CHECKING:
    from PIL import Image

    from nvila.processing import NVILAProcessor

METHODS = {"norms": "ln+lora", "tower": "lora+dora", "small": "ln+qlora", "seeing": "lora+frozen+frozen"}
PARAMS = SamplingParams(max_tokens=8, temperature=0.0)
QUESTIONS = ("what color is the shape?", "is there a red circle?")


@pytest.fixture(scope="module")
def adapters(saved_model: Path, processor: NVILAProcessor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for name, method in METHODS.items():
        make(saved_model, processor, folder / name, method)
    return {name: folder / name for name in METHODS}


def prompt(text: str, image: Image.Image | None) -> Prompt:
    parts = [Part(type="text", value=text)]
    media: dict[str, Any] = {}
    if image is not None:
        parts.insert(0, Part(type="image", value="it"))
        media["it"] = image
    return Prompt(messages=[Message(role="user", content=tuple(parts))], media=media)


def alone(folder: Path, prompts: list[Prompt]) -> list[list[int]]:
    """What the model of this folder answers with its own `generate`."""
    engine = Engine(*load_model(folder))
    return [list(trace.token_ids) for trace in run_generate(engine, prompts, PARAMS).traces]


def finished(generation: Generation) -> list[int]:
    for _ in generation:
        pass
    return generation.token_ids


def test_mixed_requests_get_the_tokens_of_each_adapters_own_generate(
    saved_model: Path, adapters: Mapping[str, Path], pictures: Mapping[str, Image.Image]
) -> None:
    image = next(iter(pictures.values()))
    prompts = [prompt(text, seen) for text in QUESTIONS for seen in (None, image)]
    expected = {name: alone(folder, prompts) for name, folder in {"": saved_model, **adapters}.items()}
    assert len({str(tokens) for tokens in expected.values()}) == len(expected), "all of them answer differently"
    engine = Engine.load(saved_model, EngineConfig(block_size=4), adapters=adapters)
    asked = {name: engine.adapter(name) for name in adapters}
    for _ in range(2):  # the second time over known prefixes and media
        running = [
            (name, number, (asked[name] if name else engine).stream(one.messages, one.media, PARAMS))
            for number, one in enumerate(prompts)
            for name in expected
        ]
        got = [(name, number, finished(generation)) for name, number, generation in running]
        assert got == [(name, number, expected[name][number]) for name, number, _ in got]
    assert engine.stats().media_misses == len(expected), "each has its own tokens of the picture, made once"
    assert running[-1][2].usage.cached_tokens > 0


def test_requests_of_several_adapters_share_steps(saved_model: Path, adapters: Mapping[str, Path]) -> None:
    engine = Engine.load(saved_model, adapters=adapters)
    one = prompt(QUESTIONS[0], None)
    finished(engine.adapter("norms").stream(one.messages, {}, PARAMS))
    single = engine.stats().steps
    running = [engine.adapter(name).stream(one.messages, {}, PARAMS) for name in adapters]
    for generation in running:
        finished(generation)
    assert engine.stats().steps - single <= 2 * single


def test_a_prefix_is_known_only_to_the_adapter_that_computed_it(
    saved_model: Path, adapters: Mapping[str, Path]
) -> None:
    engine = Engine.load(saved_model, EngineConfig(block_size=4), adapters=adapters)
    one = prompt(QUESTIONS[0], None)

    def cached(name: str) -> int:
        generation = engine.adapter(name).stream(one.messages, {}, PARAMS)
        finished(generation)
        return generation.usage.cached_tokens

    assert [cached("norms") > 0, cached("norms") > 0, cached("tower") > 0] == [False, True, False]


def test_the_base_is_shared_and_stays_as_it_is(saved_model: Path, adapters: Mapping[str, Path]) -> None:
    before, _ = load_model(saved_model)
    engine = Engine.load(saved_model, adapters=adapters)
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)), name
    assert not any(hasattr(child, "base_layer") for child in engine.model.modules())
    own: Any = engine._variants.adapters["norms"].encoder._model
    base = engine.model.model
    shared = base.vision_tower.encoder.layers[0].mlp.fc1.weight
    assert own.vision_tower.encoder.layers[0].mlp.fc1.weight is shared
    assert own.language_model.embed_tokens.weight is base.language_model.embed_tokens.weight
    norm = base.vision_tower.encoder.layers[0].layer_norm1.weight
    assert own.vision_tower.encoder.layers[0].layer_norm1.weight is not norm
    assert any(isinstance(child, FourBitLinear) for child in _language(engine, "small").modules())
    assert not any(isinstance(child, FourBitLinear) for child in engine.model.modules())


def _language(engine: Engine, name: str) -> torch.nn.Module:
    model: Any = engine._variants.adapters[name].encoder._model
    language: torch.nn.Module = model.language_model
    return language


def test_an_adapter_of_another_base_is_refused(
    saved_model: Path, processor: NVILAProcessor, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    from nvila.assembly import save_model

    other, _ = load_model(saved_model)
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    save_model(other, processor, tmp_path / "other")
    with pytest.raises(CheckpointError, match="belongs to a base with digest"):
        Engine.load(tmp_path / "other", adapters=adapters)
    with pytest.raises(CheckpointError, match=r"is no adapter: nvila_adapter\.json is missing"):
        Engine.load(saved_model, adapters={"it": saved_model})


def test_an_adapter_with_other_words_is_refused(
    saved_model: Path, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    from nvila.processing import NVILAProcessor

    shutil.copytree(adapters["norms"], tmp_path / "more")
    reads = NVILAProcessor.from_pretrained(tmp_path / "more")
    reads.tokenizer.add_tokens(["<more>"])
    reads.save_pretrained(tmp_path / "more")
    with pytest.raises(CheckpointError, match="the adapter 'more' has another tokenizer"):
        Engine.load(saved_model, adapters={"more": tmp_path / "more"})


def test_an_unknown_adapter_is_named(saved_model: Path, adapters: Mapping[str, Path]) -> None:
    engine = Engine.load(saved_model, adapters={"norms": adapters["norms"]})
    with pytest.raises(ConfigError, match=r"no adapter 'norm' \(did you mean 'norms'"):
        engine.adapter("norm")


def test_fused_products_run_the_base_and_never_lose_an_adapter(saved_model: Path, adapters: Mapping[str, Path]) -> None:
    one = prompt(QUESTIONS[0], None)
    expected = alone(adapters["norms"], [one])
    engine = Engine.load(saved_model, EngineConfig(decoder="fused"), adapters={"norms": adapters["norms"]})
    assert [finished(engine.adapter("norms").stream(one.messages, {}, PARAMS))] == expected
    assert [finished(engine.stream(one.messages, {}, PARAMS))] == alone(saved_model, [one])
    with pytest.raises(CapabilityError, match="without adapters"):
        Engine.load(adapters["norms"], EngineConfig(decoder="fused"))
