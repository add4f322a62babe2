"""Greedy answers are those of `generate`, token by token, whatever way a request takes through the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from PIL import Image

from nvila.data.records import Message, Part
from nvila.data.video import load_video
from nvila.inference.engine import Engine, EngineConfig, Generation, SamplingParams
from nvila.inference.prompt import model_inputs
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

Pictures = dict[str, Image.Image]
Ask = Callable[..., list[Message]]
GREEDY = SamplingParams(max_tokens=16)


@pytest.fixture
def questions(ask: Ask) -> list[list[Message]]:
    """Prompts of many lengths, with and without pictures."""
    return [
        ask("a"),
        ask(text="describe the image."),
        ask("b", "c", text="is there a red circle? " * 3),
        ask("d", text="blue green " * 12),
        ask("a", text="what shape is in the image?"),
        ask(text="one two three " * 7),
    ]


def tokens(engine: Engine, running: list[Generation]) -> list[list[int]]:
    for one in running:
        for _ in one:
            pass
    assert engine.stats().running == engine.stats().waiting == engine.stats().blocks_used == 0
    return [one.token_ids for one in running]


def start(engine: Engine, questions: list[list[Message]], pictures: Pictures) -> list[Generation]:
    return [engine.stream(one, pictures, GREEDY) for one in questions]


@pytest.mark.parametrize(
    "options",
    [
        {"max_running": 1},
        {},
        {"block_size": 1, "blocks": 800},
        {"block_size": 64, "blocks": 12},
        {"step_tokens": 1},
        {"step_tokens": 7},
        {"step_tokens": 7, "prefix_reuse": False},
        {"encode_tiles": 1},
        {"media_cache_bytes": 0},
        {"max_running": 3},
    ],
    ids=str,
)
def test_batched_and_chunked_answers_are_those_of_generate(
    options: dict[str, Any],
    build_engine: Callable[..., Engine],
    generated: Callable[..., list[int]],
    questions: list[list[Message]],
    pictures: Pictures,
) -> None:
    engine = build_engine(**{"blocks": 200} | options)
    assert tokens(engine, start(engine, questions, pictures)) == [generated(one) for one in questions]


def test_a_request_that_joins_or_leaves_changes_no_other(
    build_engine: Callable[..., Engine],
    generated: Callable[..., list[int]],
    questions: list[list[Message]],
    pictures: Pictures,
) -> None:
    engine = build_engine(blocks=200)
    running = [engine.stream(questions[0], pictures, GREEDY)]
    leaving = engine.stream(questions[3], pictures, GREEDY)
    next(running[0])
    for question in questions[1:]:
        running.append(engine.stream(question, pictures, GREEDY))
        next(running[0])
    assert engine.stats().running == len(questions) + 1
    leaving.close()
    assert engine.stats().running == len(questions)
    assert tokens(engine, running) == [generated(one) for one in questions]


def test_preempted_requests_go_on_where_they_were(
    build_engine: Callable[..., Engine],
    generated: Callable[..., list[int]],
    questions: list[list[Message]],
    pictures: Pictures,
) -> None:
    # Room for the prompts of several, not for their answers.
    engine = build_engine(blocks=26, prefix_reuse=False)
    assert tokens(engine, start(engine, questions, pictures)) == [generated(one) for one in questions]
    assert engine.stats().preemptions > 0


def test_preemption_finds_its_own_blocks_again(
    build_engine: Callable[..., Engine],
    generated: Callable[..., list[int]],
    questions: list[list[Message]],
    pictures: Pictures,
) -> None:
    engine = build_engine(blocks=26)
    assert tokens(engine, start(engine, questions, pictures)) == [generated(one) for one in questions]
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("step_tokens", [512, 5])
def test_prefix_hit_answers_as_the_first_time(
    step_tokens: int,
    build_engine: Callable[..., Engine],
    generated: Callable[..., list[int]],
    questions: list[list[Message]],
    pictures: Pictures,
) -> None:
    engine = build_engine(blocks=200, step_tokens=step_tokens)
    expected = [generated(one) for one in questions]
    first = start(engine, questions[:1], pictures)
    assert tokens(engine, first) == expected[:1]
    assert first[0].usage.cached_tokens == 0
    again = start(engine, questions, pictures)
    assert tokens(engine, again) == expected
    length = again[0].usage.prompt_tokens
    assert again[0].usage.cached_tokens == (length - 1) // 4 * 4
    # Question 4 has the same picture, and another text behind it.
    assert 0 < again[4].usage.cached_tokens < again[0].usage.cached_tokens


def test_a_conversation_goes_on_from_its_own_answer(
    build_engine: Callable[..., Engine], generated: Callable[..., list[int]], ask: Ask, pictures: Pictures
) -> None:
    engine = build_engine(blocks=200)
    first = engine.stream(ask("a"), pictures, GREEDY)
    said = "".join(delta.text for delta in first)
    turn = Message(role="assistant", content=(Part(type="text", value=said),))
    longer = [*ask("a"), turn, *ask(text="what shape?")]
    second = engine.stream(longer, pictures, GREEDY)
    assert tokens(engine, [second]) == [generated(longer)]
    assert second.usage.cached_tokens > first.usage.prompt_tokens // 4 * 4 - 4


def test_equal_text_with_another_picture_is_no_prefix_hit(
    build_engine: Callable[..., Engine], generated: Callable[..., list[int]], ask: Ask, pictures: Pictures
) -> None:
    engine = build_engine()
    before_picture = 0
    for key in "abcd":
        running = engine.stream(ask(key), pictures, GREEDY)
        assert tokens(engine, [running]) == [generated(ask(key))]
        prompt = engine.processor.prompt_ids(ask(key))
        before_picture = prompt.index(engine.model.config.image_token_id)
        assert running.usage.cached_tokens <= before_picture


def test_evicted_prefix_is_computed_again(
    build_engine: Callable[..., Engine],
    generated: Callable[..., list[int]],
    questions: list[list[Message]],
    pictures: Pictures,
) -> None:
    engine = build_engine(blocks=16, max_running=1)
    for _ in range(2):
        for question in (questions[0], questions[3], questions[5]):
            assert tokens(engine, [engine.stream(question, pictures, GREEDY)]) == [generated(question)]


def test_equal_pictures_are_encoded_once_over_all_requests(
    build_engine: Callable[..., Engine], generated: Callable[..., list[int]], ask: Ask, pictures: Pictures
) -> None:
    engine = build_engine(blocks=200, prefix_reuse=False)
    questions = [ask("a"), ask("b", "a"), ask("a", "a", text="what?"), ask("c")]
    expected = [generated(one) for one in questions]
    seen: list[int] = []
    hook = engine.model.model.vision_tower.embeddings.register_forward_pre_hook(
        lambda _, args: seen.append(len(args[0]))
    )
    try:
        assert tokens(engine, start(engine, questions, pictures)) == expected
        assert seen == [3]  # three different pictures, in one call
        assert tokens(engine, start(engine, questions, pictures)) == expected
        assert seen == [3]
    finally:
        hook.remove()
    assert engine.stats().media_hits > 0


def test_prefix_hit_past_the_picture_needs_no_tower(
    build_engine: Callable[..., Engine], generated: Callable[..., list[int]], ask: Ask, pictures: Pictures
) -> None:
    engine = build_engine(media_cache_bytes=0)
    expected = generated(ask("a"))
    seen: list[int] = []
    hook = engine.model.model.vision_tower.embeddings.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        for _ in range(2):
            assert tokens(engine, [engine.stream(ask("a"), pictures, GREEDY)]) == [expected]
    finally:
        hook.remove()
    assert seen == [1]


@pytest.fixture(scope="module", params=["tiny-nvila-lite", "tiny-nvila", "tiny-nvila-video"])
def variant(request: pytest.FixtureRequest) -> tuple[NVILAForConditionalGeneration, NVILAProcessor]:
    from nvila.configuration import NVILAConfig

    config = NVILAConfig.from_preset(request.param)
    config.text_config.initializer_range = 0.2
    torch.manual_seed(3)
    return NVILAForConditionalGeneration(config).eval(), NVILAProcessor.from_preset(request.param)


def test_every_kind_of_tiling_in_one_batch(
    variant: tuple[NVILAForConditionalGeneration, NVILAProcessor], pictures: Pictures
) -> None:
    model, processor = variant
    film = load_video([pictures[name] for name in "cdefghab"] * 2, num_frames=model.config.num_video_frames)
    media: dict[str, Any] = {
        "wide": pictures["a"].resize((150, 50)),
        "tall": pictures["b"].resize((40, 90)),
        "film": film,
    }
    engine = Engine(model, processor, EngineConfig(step_tokens=40, encode_tiles=4))
    for _ in range(2):  # the second time from the caches
        alone, together = [], []
        for names in ("wide", "tall wide", "film", "tall film", "wide wide"):
            parts = [Part(type="video" if name == "film" else "image", value=name) for name in names.split()]
            question = [Message(role="user", content=(*parts, Part(type="text", value="what?")))]
            inputs = model_inputs(engine.processor, question, media)
            out = cast("Any", model).generate(**inputs, max_new_tokens=8, do_sample=False)
            alone.append(out[0, inputs["input_ids"].shape[1] :].tolist())
            together.append(engine.stream(question, media, SamplingParams(max_tokens=8)))
        ends = engine.stop_ids
        assert tokens(engine, together) == [[token for token in one if token not in ends] for one in alone]
