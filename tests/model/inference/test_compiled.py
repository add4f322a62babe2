"""Compiled and recorded decoding says the same as the decoder as it is, and does without where it cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor

from nvila.data.records import Message
from nvila.errors import CapabilityError, ConfigError
from nvila.inference.attention import BlockBatch, Span
from nvila.inference.blocks import BlockPool
from nvila.inference.config import EngineConfig
from nvila.inference.decoders import TransformersDecoder, build_decoder, cache_shape
from nvila.inference.engine import Engine, SamplingParams
from nvila.inference.fused import FusedDecoder
from nvila.inference.graphs import GraphedDecoder
from nvila.modeling import NVILAForConditionalGeneration

Pictures = dict[str, Image.Image]
GREEDY = SamplingParams(max_tokens=16)


class Recorder:
    """Stands where CUDA records: runs the step again on the same tensors, and counts."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.recorded += 1
        result = step()

        def replay() -> None:
            self.replayed += 1
            result.copy_(step())

        return result, replay


def graphed(model: NVILAForConditionalGeneration, pool: BlockPool, record: Recorder) -> GraphedDecoder:
    hidden = model.config.text_config.hidden_size
    return GraphedDecoder(TransformersDecoder(model), pool, hidden=hidden, rows=3, record=record)


def use(engine: Engine, decoder: GraphedDecoder) -> None:
    engine._variants.base.runner._decoder = decoder


def test_compile_is_one_of_three() -> None:
    with pytest.raises(ConfigError, match="compile is 'yes'"):
        EngineConfig(compile="yes")  # type: ignore[arg-type]


def test_a_decoder_that_is_not_compiled_says_so(build_engine: Callable[..., Engine]) -> None:
    with pytest.raises(CapabilityError, match="decoder 'auto' is not compiled on cpu"):
        build_engine(compile="on")


@pytest.mark.parametrize("compile", ["auto", "off"])
def test_nothing_is_compiled_on_a_cpu_unless_asked_for(model: NVILAForConditionalGeneration, compile: str) -> None:
    pool = BlockPool(cache_shape(model), 2**20, 4)
    options: dict[str, object] = {"decoder": "fused", "compile": compile}
    decoder = build_decoder(model, EngineConfig(**options), pool)  # type: ignore[arg-type]
    assert isinstance(decoder, FusedDecoder)
    assert decoder._compiled is None


def test_without_a_compiler_one_line_is_logged_and_answers_come(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: object,
    build_engine: Callable[..., Engine],
    generated: Callable[..., list[int]],
    ask: Callable[..., list[Message]],
    pictures: Pictures,
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/g++",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled before is found there
    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING, "nvila.inference"):
        engine = build_engine(decoder="fused", compile="on")
    assert [record.message.startswith("decoding is not compiled: ") for record in caplog.records] == [True]
    running = engine.stream(ask("a"), pictures, GREEDY)
    list(running)
    assert running.token_ids == generated(ask("a"))


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["fused", "fused-int8"])
def test_compiled_greedy_answers_are_the_same(
    decoder: str, build_engine: Callable[..., Engine], ask: Callable[..., list[Message]], pictures: Pictures
) -> None:
    said = {}
    for compile in ("off", "on"):
        engine = build_engine(blocks=60, decoder=decoder, compile=compile, max_running=3)
        running = [engine.stream(one, pictures, GREEDY) for one in (ask("a"), ask(text="describe it."), ask("b", "c"))]
        torch._dynamo.utils.counters.clear()
        for one in running:
            list(one)
        assert not torch._dynamo.utils.counters["frames"], "compiled again while requests waited"
        said[compile] = [one.token_ids for one in running]
        assert (getattr(engine._variants.base.runner._decoder, "_compiled", None) is not None) == (compile == "on")
    assert said["on"] == said["off"]


def test_recorded_steps_have_the_logits_of_the_decoder(model: NVILAForConditionalGeneration) -> None:
    tables = [[5, 1, 2], [7, 3, 4], list(range(10, 22))]
    plain_pool, recorded_pool = (BlockPool(cache_shape(model), 2**20, 4) for _ in range(2))
    record = Recorder()
    decoders = (TransformersDecoder(model), plain_pool), (graphed(model, recorded_pool, record), recorded_pool)
    torch.manual_seed(0)
    steps = [[9, 5, 41], [1, 1, 1], [1, 1, 1], [1, 1]]
    at = [0, 0, 0]
    for lengths in steps:
        spans = [Span(tables[row], at[row], length) for row, length in enumerate(lengths)]
        embeds = torch.randn(sum(lengths), model.config.text_config.hidden_size)
        rows = torch.tensor(lengths).cumsum(0) - 1
        with torch.inference_mode():
            plain, found = (decoder(embeds, BlockBatch(pool, spans), rows) for decoder, pool in decoders)
        torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
        at = [one + length for one, length in zip(at, (*lengths, 0), strict=False)]
    assert (record.recorded, record.replayed) == (2, 3)
    for plain, found in zip(plain_pool.keys, recorded_pool.keys, strict=True):
        torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)


def test_greedy_answers_with_recorded_steps_are_those_of_generate(
    model: NVILAForConditionalGeneration,
    build_engine: Callable[..., Engine],
    generated: Callable[..., list[int]],
    ask: Callable[..., list[Message]],
    pictures: Pictures,
) -> None:
    engine, record = build_engine(blocks=60), Recorder()
    decoder = graphed(model, engine._pool, record)
    assert decoder.warm_up()
    assert record.recorded == 3
    use(engine, decoder)
    questions = [ask("a"), ask(text="describe the image."), ask("b", "c")]
    running = [engine.stream(one, pictures, GREEDY) for one in questions]
    for one in running:
        list(one)
    assert [one.token_ids for one in running] == [generated(one) for one in questions]
    assert record.replayed > 3
    assert not any(pool[: engine.config.block_size].any() for pool in (*engine._pool.keys, *engine._pool.values))


def test_where_nothing_can_be_recorded_steps_run_as_before(
    model: NVILAForConditionalGeneration,
    caplog: pytest.LogCaptureFixture,
    build_engine: Callable[..., Engine],
    generated: Callable[..., list[int]],
    ask: Callable[..., list[Message]],
    pictures: Pictures,
) -> None:
    def refuse(step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    engine = build_engine()
    hidden = model.config.text_config.hidden_size
    decoder = GraphedDecoder(TransformersDecoder(model), engine._pool, hidden=hidden, rows=3, record=refuse)
    with caplog.at_level(logging.WARNING, "nvila.inference"):
        assert not decoder.warm_up()
        use(engine, decoder)
        running = engine.stream(ask("a"), pictures, GREEDY)
        list(running)
    assert running.token_ids == generated(ask("a"))
    assert [record.message for record in caplog.records] == [
        "decoding is not recorded as CUDA graphs: operation not permitted when stream is capturing"
    ]
