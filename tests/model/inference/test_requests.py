"""What a request may ask for, what happens when it cannot be had, and that nothing is left behind."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from PIL import Image

from nvila.data.records import Message
from nvila.errors import ConfigError, DataError, DeadlineError, OverloadedError
from nvila.inference.engine import Engine, EngineConfig, SamplingParams
from nvila.inference.prompt import model_inputs
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

Pictures = dict[str, Image.Image]
Ask = Callable[..., list[Message]]
Build = Callable[..., Engine]
GREEDY = SamplingParams(max_tokens=16)


def assert_empty(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)


def test_generate_answers_all_in_order(
    build_engine: Build, generated: Callable[..., list[int]], ask: Ask, pictures: Pictures
) -> None:
    engine = build_engine(blocks=200)
    questions = [ask("a"), ask("b"), ask(text="describe the image.")]
    answers = engine.generate([(one, pictures) for one in questions], GREEDY)
    decode = engine.processor.tokenizer.decode
    assert [one.text for one in answers] == [
        decode(generated(one), skip_special_tokens=True).lstrip() for one in questions
    ]
    assert all(one.usage.completion_tokens <= 16 for one in answers)
    with pytest.raises(DataError, match="'nowhere'"):
        engine.generate([(ask("a"), pictures), (ask("nowhere"), pictures)], GREEDY)
    assert_empty(engine)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_generate(
    penalty: float, build_engine: Build, generated: Callable[..., list[int]], ask: Ask, pictures: Pictures
) -> None:
    running = build_engine().stream(ask("a"), pictures, SamplingParams(max_tokens=16, repetition_penalty=penalty))
    list(running)
    expected = generated(ask("a"), repetition_penalty=penalty)
    assert running.token_ids == expected
    assert expected != generated(ask("a"))


def test_presence_and_frequency_penalties_lower_what_was_said(
    build_engine: Build, ask: Ask, pictures: Pictures
) -> None:
    def said(**penalties: float) -> list[int]:
        running = build_engine().stream(ask("a"), pictures, SamplingParams(max_tokens=24, **penalties))  # type: ignore[arg-type]  # numbers only
        list(running)
        return running.token_ids

    plain = said()
    for penalties in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        assert len(set(said(**penalties))) > len(set(plain))
    assert len(set(said(presence_penalty=-2.0, frequency_penalty=-2.0))) <= len(set(plain))


def test_top_k_one_is_greedy_at_any_temperature(build_engine: Build, ask: Ask, pictures: Pictures) -> None:
    engine = build_engine()
    greedy = engine.stream(ask("a"), pictures, GREEDY)
    sampled = engine.stream(ask("a"), pictures, SamplingParams(max_tokens=16, temperature=5.0, top_k=1))
    assert list(greedy) == list(sampled)


def test_logprobs_are_the_models_own(
    build_engine: Build, model: NVILAForConditionalGeneration, ask: Ask, pictures: Pictures
) -> None:
    """Teacher forcing with the whole answer gives the same figures."""
    engine = build_engine()
    # A seed under which no placeholder of a medium is said: the check below could not read it back.
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=1, logprobs=4, presence_penalty=0.5)
    running = engine.stream(ask("a"), pictures, params)
    reported = [one for delta in running for one in delta.logprobs]
    ids = running.token_ids
    inputs = model_inputs(engine.processor, ask("a"), pictures)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
    with torch.inference_mode():
        logits = cast("Any", model)(**inputs).logits[0, -len(ids) - 1 : -1]
    logprobs = logits.log_softmax(-1)
    assert [one.logprob for one in reported] == pytest.approx(logprobs[range(len(ids)), ids].tolist(), abs=1e-4)
    assert [one.text for one in reported] == [engine.processor.tokenizer.decode([token]) for token in ids]
    for one, row in zip(reported, logprobs, strict=True):
        assert [value for _, value in one.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


def test_seeded_answer_does_not_depend_on_who_else_is_asked(build_engine: Build, ask: Ask, pictures: Pictures) -> None:
    params = SamplingParams(max_tokens=16, temperature=2.0, seed=7)
    alone = build_engine().generate([(ask("a"), pictures)], params)
    together = build_engine(blocks=200).generate([(ask(key), pictures) for key in "bacd"], params)
    assert together[1].text == alone[0].text


# JSON


@pytest.fixture(scope="module")
def spelling() -> tuple[NVILAForConditionalGeneration, NVILAProcessor]:
    """A model whose tokens are bytes, so that it can spell any JSON."""
    from nvila.configuration import NVILAConfig

    config = NVILAConfig.from_preset("tiny-nvila-lite")
    torch.manual_seed(1)
    return NVILAForConditionalGeneration(config).eval(), NVILAProcessor.from_preset("tiny-nvila-lite")


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["color", "count"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_follow_their_schema_beside_free_ones(
    temperature: float, spelling: tuple[NVILAForConditionalGeneration, NVILAProcessor], ask: Ask
) -> None:
    engine = Engine(*spelling)
    params = SamplingParams(max_tokens=80, temperature=temperature, seed=2, json_schema=json.dumps(SCHEMA))
    free = engine.stream(ask(text="hello"), {}, SamplingParams(max_tokens=20))
    bound = engine.stream(ask(text="which color?"), {}, params)
    deltas = list(bound)
    said = json.loads("".join(delta.text for delta in deltas))
    assert set(said) == {"color", "count"}
    assert said["color"] in ("red", "blue")
    assert said["count"] in range(10)
    assert deltas[-1].finish_reason == "stop"
    assert list(free) == list(Engine(*spelling).stream(ask(text="hello"), {}, SamplingParams(max_tokens=20)))
    assert_empty(engine)


@pytest.mark.parametrize(
    ("schema", "says"),
    [("{", "is not JSON"), ('{"type": "nonsense"}', "cannot be followed"), ('{"enum": []}', "cannot be followed")],
)
def test_schema_that_cannot_be_followed_is_refused(
    schema: str, says: str, spelling: tuple[NVILAForConditionalGeneration, NVILAProcessor], ask: Ask
) -> None:
    engine = Engine(*spelling)
    with pytest.raises(ConfigError, match=says):
        engine.stream(ask(text="hello"), {}, SamplingParams(json_schema=schema))
    assert_empty(engine)


# Bounds


def test_prompt_over_the_cache_names_both(build_engine: Build, ask: Ask, pictures: Pictures) -> None:
    engine = build_engine(blocks=3)
    with pytest.raises(DataError, match=r"tokens; the KV cache takes 12 with its answer \(4 of them are visual"):
        engine.stream(ask("a"), pictures, GREEDY)


def test_too_many_images_are_named(build_engine: Build, ask: Ask, pictures: Pictures) -> None:
    with pytest.raises(DataError, match="160 of them are visual: send fewer or smaller images"):
        build_engine(blocks=500).stream(ask(*"abcdefgh" * 5), pictures, GREEDY)


def test_answer_ends_where_the_cache_does(build_engine: Build, ask: Ask, pictures: Pictures) -> None:
    prompt = build_engine().stream(ask("a"), pictures, GREEDY).usage.prompt_tokens
    engine = build_engine(blocks=-(-prompt // 4) + 1)
    running = engine.stream(ask("a"), pictures, SamplingParams(max_tokens=100, temperature=3.0, seed=4))
    assert list(running)[-1].finish_reason == "length"
    assert running.usage.completion_tokens == engine.stats().blocks * 4 - prompt


@pytest.mark.parametrize("shed", ["newest", "oldest"])
def test_overload_is_shed_by_policy(shed: str, build_engine: Build, ask: Ask, pictures: Pictures) -> None:
    engine = build_engine(blocks=200, max_running=1, max_waiting=1, shed=shed)
    running = [engine.stream(ask(key), pictures, GREEDY) for key in "ab"]
    if shed == "newest":
        with pytest.raises(OverloadedError, match="wait already"):
            engine.stream(ask("c"), pictures, GREEDY)
    else:
        running.append(engine.stream(ask("c"), pictures, GREEDY))
        with pytest.raises(OverloadedError, match="newer requests"):
            list(running.pop(0))
    assert all(list(one)[-1].finish_reason for one in running)
    assert_empty(engine)


def test_a_full_cache_lets_requests_wait_and_then_sheds(build_engine: Build, ask: Ask, pictures: Pictures) -> None:
    prompt = build_engine().stream(ask("a"), pictures, GREEDY).usage.prompt_tokens
    engine = build_engine(blocks=-(-prompt // 4) + 4, max_running=2, max_waiting=1)
    params = SamplingParams(max_tokens=12)
    running = [engine.stream(ask(key), pictures, params) for key in "abc"]
    said = [next(running[0]).text]
    assert (engine.stats().running, engine.stats().waiting) == (1, 2)  # places for two, blocks for one
    with pytest.raises(OverloadedError, match="wait already"):
        engine.stream(ask("d"), pictures, params)
    texts = ["".join([*(said if one is running[0] else ()), *(delta.text for delta in one)]) for one in running]
    assert texts == [build_engine().generate([(ask(key), pictures)], params)[0].text for key in "abc"]
    assert_empty(engine)


def test_deadline_ends_a_request_and_no_other(build_engine: Build, ask: Ask, pictures: Pictures) -> None:
    engine = build_engine(blocks=200)
    late = engine.stream(ask("a"), pictures, GREEDY, timeout_s=0.01)
    fine = engine.stream(ask("b"), pictures, GREEDY, timeout_s=600)
    time.sleep(0.02)
    with pytest.raises(DeadlineError):
        list(late)
    assert list(fine)[-1].finish_reason
    assert_empty(engine)


def test_abort_frees_blocks_at_once_and_twice_is_once(build_engine: Build, ask: Ask, pictures: Pictures) -> None:
    engine = build_engine(blocks=200)
    first, second = (engine.stream(ask(key), pictures, SamplingParams(max_tokens=60)) for key in "ab")
    next(first)
    used = engine.stats().blocks_used
    engine.abort(second)
    assert 0 < engine.stats().blocks_used < used
    engine.abort(second)
    second.close()
    assert list(second) == []
    assert list(first)[-1].finish_reason
    engine.abort(first)
    assert_empty(engine)


def test_a_waiting_request_can_be_aborted(build_engine: Build, ask: Ask, pictures: Pictures) -> None:
    engine = build_engine(max_running=1)
    first, second = (engine.stream(ask(key), pictures, GREEDY) for key in "ab")
    next(first)
    second.close()
    assert engine.stats().waiting == 0
    assert list(first)[-1].finish_reason


def test_a_forgotten_stream_frees_its_memory(build_engine: Build, ask: Ask, pictures: Pictures) -> None:
    engine = build_engine(blocks=200)
    other = engine.stream(ask("b"), pictures, GREEDY)
    forgotten = engine.stream(ask("a"), pictures, SamplingParams(max_tokens=60))
    next(forgotten)
    del forgotten
    assert list(other)[-1].finish_reason
    assert_empty(engine)


def test_the_error_of_another_does_not_keep_a_forgotten_stream(
    build_engine: Build, ask: Ask, pictures: Pictures
) -> None:
    engine = build_engine(blocks=200)
    marker = engine.processor.tokenizer.convert_tokens_to_ids("stop")
    hook = engine.model.model.language_model.register_forward_pre_hook(poison(marker, "raises"), with_kwargs=True)
    bad = engine.stream(ask(text="stop stop"), pictures, GREEDY)

    def ask_and_forget() -> None:
        forgotten = engine.stream(ask("a"), pictures, SamplingParams(max_tokens=60))
        next(forgotten)  # runs the step in which the other one fails

    try:
        ask_and_forget()
        assert_empty(engine)
        with pytest.raises(RuntimeError, match="poisoned"):
            list(bad)
    finally:
        hook.remove()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Keep the collector from freeing what only the count of references should."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_the_error_of_a_cancelled_one_does_not_keep_a_forgotten_stream(
    build_engine: Build, ask: Ask, pictures: Pictures
) -> None:
    engine = build_engine(blocks=200)
    marker = engine.processor.tokenizer.convert_tokens_to_ids("stop")
    bad = engine.stream(ask(text="stop stop"), pictures, GREEDY)

    def cancel(*_: Any) -> None:
        bad.close()  # as another thread would while the model runs

    language = engine.model.model.language_model
    hooks = [
        language.register_forward_pre_hook(cancel),
        language.register_forward_pre_hook(poison(marker, "raises"), with_kwargs=True),
    ]

    def ask_and_forget() -> None:
        forgotten = engine.stream(ask("a"), pictures, SamplingParams(max_tokens=60))
        next(forgotten)

    try:
        ask_and_forget()
        assert_empty(engine)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("cancelled", [False, True])
def test_errors_of_several_pictures_do_not_keep_a_forgotten_stream(
    build_engine: Build, ask: Ask, pictures: Pictures, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    engine = build_engine(blocks=200)
    bad = engine.stream(ask("a", "b"), pictures, GREEDY)
    calls = []

    def refuse(*_: Any) -> None:
        calls.append(1)
        if cancelled:
            bad.close()
        raise RuntimeError("no such picture")

    monkeypatch.setattr(engine._variants.base.encoder, "_codes", refuse)

    def ask_and_forget() -> None:
        forgotten = engine.stream(ask(text="what shape is it?"), pictures, SamplingParams(max_tokens=60))
        next(forgotten)

    ask_and_forget()
    assert calls
    assert_empty(engine)


def poison(marker: int, how: str) -> Callable[..., Any]:
    """Make a hook that raises, or makes NaN, wherever the embedding of a token occurs."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs["inputs_embeds"]
        hit = (embeds == module.get_input_embeddings().weight[marker]).all(-1)
        if not hit.any():
            return None
        if how == "raises":
            raise RuntimeError("poisoned")
        return args, kwargs | {"inputs_embeds": embeds.masked_fill(hit[..., None], torch.nan)}

    return hook


@pytest.mark.parametrize("how", ["raises", "nan"])
@pytest.mark.parametrize("step_tokens", [512, 6])
def test_poisoned_request_harms_no_other(
    how: str,
    step_tokens: int,
    build_engine: Build,
    generated: Callable[..., list[int]],
    ask: Ask,
    pictures: Pictures,
) -> None:
    engine = build_engine(blocks=60, step_tokens=step_tokens)
    good = [ask("a"), ask("b"), ask(text="describe the image.")]
    expected = [generated(one) for one in good]
    marker = engine.processor.tokenizer.convert_tokens_to_ids("stop")
    bad = ask("a", text="stop stop stop")
    hook = engine.model.model.language_model.register_forward_pre_hook(poison(marker, how), with_kwargs=True)
    try:
        for _ in range(3):  # its blocks go round to the others
            running = [engine.stream(one, pictures, GREEDY) for one in (good[0], bad, *good[1:])]
            poisoned = running.pop(1)
            with pytest.raises(Exception, match=r"poisoned|not finite"):
                list(poisoned)
            for one in running:
                list(one)
            assert [one.token_ids for one in running] == expected
    finally:
        hook.remove()
    assert_empty(engine)
    assert all(tensor.isfinite().all() for tensor in engine._pool.keys + engine._pool.values)


def test_medium_the_tower_fails_on_harms_no_other(
    build_engine: Build, generated: Callable[..., list[int]], ask: Ask, pictures: Pictures
) -> None:
    engine = build_engine(blocks=200)
    expected = generated(ask("a"))
    bad_pixels = model_inputs(engine.processor, ask("b"), pictures)["pixel_values"]

    def fail(_: Any, args: Any) -> None:
        if any(torch.equal(tile, bad_pixels[0]) for tile in args[0]):
            raise RuntimeError("the tower fell")

    hook = engine.model.model.vision_tower.embeddings.register_forward_pre_hook(fail)
    try:
        fine, bad = (engine.stream(ask(key), pictures, GREEDY) for key in "ab")
        with pytest.raises(RuntimeError, match="the tower fell"):
            list(bad)
        list(fine)
    finally:
        hook.remove()
    assert fine.token_ids == expected
    assert_empty(engine)


def test_many_threads_arrive_cancel_and_finish(
    build_engine: Build, generated: Callable[..., list[int]], ask: Ask, pictures: Pictures
) -> None:
    """A short soak: no answer is lost or mixed up, and every block comes back."""
    engine = build_engine(blocks=48, max_running=5)
    expected = {key: generated(ask(key)) for key in "abcdefgh"}
    wrong: list[str] = []

    def work(number: int) -> None:
        for turn in range(4):
            key = "abcdefgh"[(number + turn) % 8]
            running = engine.stream(ask(key), pictures, GREEDY)
            if (number + turn) % 3 == 0:
                next(running)
                running.close()
                continue
            list(running)
            if running.token_ids != expected[key]:
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []
    assert_empty(engine)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kv_cache_bytes", 0),
        ("block_size", 0),
        ("max_running", 0),
        ("max_waiting", -1),
        ("shed", "all"),
        ("step_tokens", 0),
    ],
)
def test_engine_setting_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        EngineConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", -1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -3.0),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("stop", ("",)),
    ],
)
def test_sampling_parameter_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        SamplingParams(**{field: value})


def test_cache_without_room_for_a_block_is_refused(
    model: NVILAForConditionalGeneration, processor: NVILAProcessor
) -> None:
    with pytest.raises(ConfigError, match="kv_cache_bytes is 1000, one block of 16 positions takes"):
        Engine(model, processor, EngineConfig(kv_cache_bytes=1000))
