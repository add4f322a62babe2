"""CUDA graphs of decoding steps: the same greedy answers with and without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from nvila.data.records import Message, Part
from nvila.inference.config import EngineConfig
from nvila.inference.engine import Engine, SamplingParams
from nvila.inference.graphs import GraphedDecoder

if TYPE_CHECKING:
    from nvila.modeling import NVILAForConditionalGeneration
    from nvila.processing import NVILAProcessor

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("decoder", ["transformers", "fused"])
def test_greedy_answers_are_the_same(
    decoder: Any, fresh_model: NVILAForConditionalGeneration, processor: NVILAProcessor
) -> None:
    cast("Any", fresh_model).to("cuda")
    texts = ("what color is the shape?", "describe the image.", "what shape is it?")
    said = {}
    for compile in ("off", "on"):
        options: dict[str, Any] = {"decoder": decoder, "compile": compile}
        engine = Engine(fresh_model, processor, EngineConfig(kv_cache_bytes=2**24, block_size=4, **options))
        assert isinstance(engine._variants.base.runner._decoder, GraphedDecoder) == (compile == "on")
        questions = [[Message(role="user", content=(Part(type="text", value=text),))] for text in texts]
        running = [engine.stream(one, {}, SamplingParams(max_tokens=32)) for one in questions]
        for one in running:
            list(one)
        said[compile] = [one.token_ids for one in running]
    assert said["on"] == said["off"]
