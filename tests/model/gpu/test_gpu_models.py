"""Answers on a GPU: fp32 and bf16, quantized models, and the engine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import nn

from nvila.data.records import Message, Part
from nvila.inference.config import EngineConfig
from nvila.inference.engine import Engine, SamplingParams
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.quantization.config import QuantizationConfig
from nvila.quantization.quantize import quantize_model

pytestmark = pytest.mark.gpu
Move = Callable[[Any], Any]
Pictures = dict[str, Image.Image]


def ask(*keys: str) -> list[Message]:
    content = (*(Part(type="image", value=key) for key in keys), Part(type="text", value="what color is the shape?"))
    return [Message(role="user", content=content)]


def inputs_of(processor: NVILAProcessor, pictures: Pictures, *keys: str) -> dict[str, Any]:
    prompt = processor.prompt_ids(ask(*keys))
    pixels = processor.pixel_values([pictures[key] for key in keys])
    mask = torch.ones(1, len(prompt)).long()
    return {"input_ids": torch.tensor([prompt]), "attention_mask": mask, "pixel_values": pixels}


def generated(model: NVILAForConditionalGeneration, inputs: dict[str, Any]) -> list[int]:
    out = cast("Any", model).generate(**inputs, max_new_tokens=12, do_sample=False)
    return cast("list[int]", out[0, inputs["input_ids"].shape[1] :].tolist())


def test_fp32_says_what_the_cpu_says(
    model: NVILAForConditionalGeneration, processor: NVILAProcessor, pictures: Pictures, moved: Move
) -> None:
    inputs = inputs_of(processor, pictures, "a", "b")
    assert generated(moved(copy.deepcopy(model)), moved(inputs)) == generated(model, inputs)


def test_bf16_is_near_fp32_and_generates(
    model: NVILAForConditionalGeneration, processor: NVILAProcessor, pictures: Pictures, moved: Move
) -> None:
    inputs = moved(inputs_of(processor, pictures, "a"))
    wide = moved(copy.deepcopy(model))
    narrow = nn.Module.to(copy.deepcopy(wide), torch.bfloat16)
    with torch.no_grad():
        expected = wide(**inputs).logits.float()
        found = narrow(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}).logits.float()
    assert float((found - expected).norm() / expected.norm()) < 0.05
    tokens = generated(narrow, {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()})
    assert 0 < len(tokens) <= 12


def test_quantized_model_gives_the_logits_of_the_cpu(
    model: NVILAForConditionalGeneration, processor: NVILAProcessor, pictures: Pictures, moved: Move
) -> None:
    inputs = inputs_of(processor, pictures, "a")
    quantized = copy.deepcopy(model)
    quantize_model(quantized, QuantizationConfig(group_size=32))
    with torch.no_grad():
        expected = quantized(**inputs).logits
        found = moved(copy.deepcopy(quantized))(**moved(inputs)).logits.cpu()
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("keys", [("a",), ("a", "b"), ()], ids=["one image", "two", "text"])
def test_engine_says_what_generate_says(
    model: NVILAForConditionalGeneration,
    processor: NVILAProcessor,
    pictures: Pictures,
    keys: tuple[str, ...],
    moved: Move,
) -> None:
    placed = moved(copy.deepcopy(model))
    engine = Engine(placed, processor, EngineConfig(kv_cache_bytes=2**22, block_size=4))
    prompt = processor.prompt_ids(ask(*keys))
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt)).long()}
    inputs = inputs_of(processor, pictures, *keys) if keys else inputs
    expected = processor.tokenizer.decode(generated(placed, moved(inputs)), skip_special_tokens=True)
    deltas = list(engine.stream(ask(*keys), pictures, SamplingParams(max_tokens=12)))
    assert "".join(delta.text for delta in deltas) == expected.lstrip()


def test_engine_answers_many_at_once_as_alone(
    model: NVILAForConditionalGeneration, processor: NVILAProcessor, pictures: Pictures, moved: Move
) -> None:
    engine = Engine(moved(copy.deepcopy(model)), processor, EngineConfig(kv_cache_bytes=2**24, block_size=4))
    params = SamplingParams(max_tokens=8)
    alone = [engine.generate([(ask(key), pictures)], params)[0].text for key in "abcd"]
    together = [one.text for one in engine.generate([(ask(key), pictures) for key in "abcd"], params)]
    assert together == alone
