"""Questions for the tiny model, and what its own `generate` answers to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import pytest

if TYPE_CHECKING:
    from PIL import Image

    from nvila.data.records import Message
    from nvila.inference.engine import Engine
    from nvila.modeling import NVILAForConditionalGeneration
    from nvila.processing import NVILAProcessor

Pictures = dict[str, "Image.Image"]


@pytest.fixture(scope="session")
def ask() -> Callable[..., list[Message]]:
    """Make a conversation from names of pictures and a text."""
    from nvila.data.records import Message, Part

    def make(*keys: str, text: str = "what color is the shape?") -> list[Message]:
        content = (*(Part(type="image", value=key) for key in keys), Part(type="text", value=text))
        return [Message(role="user", content=content)]

    return make


@pytest.fixture(scope="session")
def build_engine(model: NVILAForConditionalGeneration, processor: NVILAProcessor) -> Callable[..., Engine]:
    """Make an engine; sizes are given in blocks instead of bytes."""
    from nvila.inference.config import EngineConfig
    from nvila.inference.decoders import cache_shape
    from nvila.inference.engine import Engine

    def make(*, blocks: int = 64, **options: Any) -> Engine:
        size = options.setdefault("block_size", 4)
        num_bytes = blocks * size * cache_shape(model).bytes_per_token
        return Engine(model, processor, EngineConfig(kv_cache_bytes=num_bytes, **options))

    return make


@pytest.fixture(scope="session")
def generated(
    model: NVILAForConditionalGeneration, processor: NVILAProcessor, pictures: Pictures
) -> Callable[..., list[int]]:
    """Answer with the model's own `generate`, one conversation alone; the answer's tokens without the last eos."""
    known: dict[Any, list[int]] = {}

    def answer(messages: list[Message], max_tokens: int = 16, **options: Any) -> list[int]:
        key = (tuple(messages), max_tokens, tuple(sorted(options.items())))
        if key not in known:
            conversation = [
                {
                    "role": message.role,
                    "content": [
                        {"type": part.type, part.type: pictures[part.value] if part.type == "image" else part.value}
                        for part in message.content
                    ],
                }
                for message in messages
            ]
            inputs = processor.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            out = cast("Any", model).generate(**inputs, max_new_tokens=max_tokens, do_sample=False, **options)
            tokens = out[0, inputs["input_ids"].shape[1] :].tolist()
            known[key] = [token for token in tokens if token != processor.tokenizer.eos_token_id]
        return known[key]

    return answer
