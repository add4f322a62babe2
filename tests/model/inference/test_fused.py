"""The fused decoder is the model: same logits, same greedy answers; with 8-bit weights within a stated bound."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaModel

from nvila.data.records import Message
from nvila.errors import CapabilityError
from nvila.inference.attention import BlockBatch, Span
from nvila.inference.blocks import BlockPool
from nvila.inference.decoders import TransformersDecoder, cache_shape
from nvila.inference.engine import Engine, SamplingParams
from nvila.inference.fused import _MOST_PACKED, FusedDecoder, _Int8
from nvila.modeling import NVILAForConditionalGeneration

Pictures = dict[str, Image.Image]
GREEDY = SamplingParams(max_tokens=16)


def logits(model: NVILAForConditionalGeneration, decoder: FusedDecoder | TransformersDecoder) -> torch.Tensor:
    """Run three requests of different length: two prompts, then one token each beside a third prompt."""
    pool = BlockPool(cache_shape(model), 2**20, 4)
    torch.manual_seed(0)
    tables = [[1, 2, 3], [7, 5, 6], [4, 8]]
    steps = [
        [Span(tables[0], 0, 9), Span(tables[1], 0, 5)],
        [Span(tables[0], 9, 1), Span(tables[1], 5, 1), Span(tables[2], 0, 6)],
    ]
    found = []
    for spans in steps:
        embeds = torch.randn(sum(span.length for span in spans), model.config.text_config.hidden_size)
        rows = torch.tensor([span.length for span in spans]).cumsum(0) - 1
        with torch.inference_mode():
            found.append(decoder(embeds, BlockBatch(pool, spans), rows))
    return torch.cat(found)


def test_logits_are_those_of_the_model(model: NVILAForConditionalGeneration) -> None:
    torch.testing.assert_close(
        logits(model, FusedDecoder(model)), logits(model, TransformersDecoder(model)), atol=1e-4, rtol=1e-4
    )


def test_llama_is_known_too(fresh_model: NVILAForConditionalGeneration) -> None:
    old = fresh_model.config.text_config
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=old.vocab_size,
        initializer_range=0.2,
    )
    config._attn_implementation = "sdpa"
    fresh_model.model.language_model = LlamaModel(config).eval()
    fresh_model.config.text_config = config
    torch.testing.assert_close(
        logits(fresh_model, FusedDecoder(fresh_model)),
        logits(fresh_model, TransformersDecoder(fresh_model)),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("step_tokens", [512, 7])
def test_greedy_answers_are_those_of_generate(
    step_tokens: int,
    build_engine: Callable[..., Engine],
    generated: Callable[..., list[int]],
    ask: Callable[..., list[Message]],
    pictures: Pictures,
) -> None:
    engine = build_engine(blocks=60, decoder="fused", step_tokens=step_tokens)
    questions = [ask("a"), ask(text="describe the image."), ask("b", "c")]
    running = [engine.stream(one, pictures, GREEDY) for one in questions]
    for one in running:
        list(one)
    assert [one.token_ids for one in running] == [generated(one) for one in questions]


def test_eight_bit_weights_are_near(model: NVILAForConditionalGeneration) -> None:
    wide, rounded = logits(model, FusedDecoder(model)), logits(model, FusedDecoder(model, int8=True))
    error = (wide - rounded).norm() / wide.norm()
    assert 0 < error < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tokens_take_another_way_to_the_same_eight_bit_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    product = _Int8(torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype))
    x = torch.randn(_MOST_PACKED + 1, 64).to(dtype)
    packed = torch.cat([product(x[:9]), product(x[9:])])
    atol, rtol = (1e-4, 1e-4) if dtype == torch.float32 else (0.1, 0.02)
    torch.testing.assert_close(product(x), packed, atol=atol, rtol=rtol)


def test_models_of_another_kind_are_refused(fresh_model: NVILAForConditionalGeneration) -> None:
    other = copy.copy(fresh_model)
    other.config.text_config.model_type = "gpt2"
    with pytest.raises(CapabilityError, match="not this 'gpt2'"):
        FusedDecoder(other)
