from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from nvila.chat import ChatModel
from nvila.configuration import NVILAConfig
from nvila.data.records import Message, Part
from nvila.data.video import load_video
from nvila.errors import CheckpointError, ConfigError, DataError
from nvila.inference.answer_text import AnswerText
from nvila.inference.engine import Delta, Engine, SamplingParams, choose_token
from nvila.inference.prompt import model_inputs
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.quantization.config import QuantizationConfig
from nvila.quantization.quantize import quantize_model
from nvila.quantization.saved import save_quantized

Pictures = dict[str, Image.Image]
# Hot enough that an untrained model says many different words; the seed makes the answer always the same.
TALKATIVE = SamplingParams(max_tokens=24, temperature=3.0, seed=4)


def ask(*keys: str, text: str = "what color is the shape?") -> list[Message]:
    content = (*(Part(type="image", value=key) for key in keys), Part(type="text", value=text))
    return [Message(role="user", content=content)]


def answer(engine: Engine, messages: list[Message], pictures: Pictures, params: SamplingParams) -> list[Delta]:
    return list(engine.stream(messages, pictures, params))


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.fixture(scope="module")
def engine(model: NVILAForConditionalGeneration, processor: NVILAProcessor) -> Engine:
    return Engine(model, processor)


@pytest.mark.parametrize("keys", [(), ("a",), ("b",), ("a", "b"), ("b", "a")])
def test_greedy_stream_says_what_generate_says(engine: Engine, pictures: Pictures, keys: tuple[str, ...]) -> None:
    messages = ask(*keys)
    prompt = engine.processor.prompt_ids(messages)
    pixels = engine.processor.pixel_values([pictures[key] for key in keys]) if keys else None
    tokens = cast("Any", engine.model).generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        pixel_values=pixels,
        do_sample=False,
        max_new_tokens=12,
        use_cache=False,
    )[0, len(prompt) :]
    expected = engine.processor.tokenizer.decode(tokens, skip_special_tokens=True)
    deltas = answer(engine, messages, pictures, SamplingParams(max_tokens=12))
    assert text_of(deltas) == expected.lstrip()
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == ("length" if len(tokens) == 12 else "stop")


@pytest.fixture(scope="module", params=["tiny-nvila-lite", "tiny-nvila", "tiny-nvila-video"])
def variant(request: pytest.FixtureRequest) -> ChatModel:
    """A model of each kind of tiling, with weights wide enough that argmax is no toss-up."""
    config = NVILAConfig.from_preset(request.param)
    config.text_config.initializer_range = 0.2
    torch.manual_seed(3)
    model = NVILAForConditionalGeneration(config).eval()
    return ChatModel(model, NVILAProcessor.from_preset(request.param))


@pytest.mark.parametrize("keys", ["wide", "wide tall", "film", "tall film", ""])
def test_every_variant_is_answered_as_chat_answers(variant: ChatModel, keys: str, pictures: Pictures) -> None:
    """One image is tiled and several are not, here as there; videos are pooled."""
    film = [pictures[name] for name in "cdefghab"] * 2
    media: dict[str, Any] = {
        "wide": pictures["a"].resize((150, 50)),
        "tall": pictures["b"].resize((40, 90)),
        "film": load_video(film, num_frames=variant.model.config.num_video_frames),
    }
    names = keys.split()
    parts = [Part(type="video" if name == "film" else "image", value=name) for name in names]
    question = Message(role="user", content=(*parts, Part(type="text", value="what?")))
    running = Engine(variant.model, variant.processor).stream([question], media, SamplingParams(max_tokens=8))
    said = text_of(list(running)).strip()
    assert said == variant.chat([*(media[name] for name in names), "what?"], max_new_tokens=8)
    count = variant.processor.count_tokens(
        image_sizes=[media[name].size for name in names if name != "film"],
        video_frames=[len(media["film"])] * names.count("film"),
    )
    assert running.usage.visual_tokens == count.visual
    assert (running.usage.visual_tokens > 0) == bool(names)


def test_the_image_matters(engine: Engine, pictures: Pictures) -> None:
    answers = {text_of(answer(engine, ask(key), pictures, SamplingParams(max_tokens=12))) for key in pictures}
    assert len(answers) > 1


def test_text_arrives_in_pieces_while_it_is_made(engine: Engine, pictures: Pictures) -> None:
    deltas = answer(engine, ask("a"), pictures, TALKATIVE)
    assert len([delta for delta in deltas if delta.text]) > 10


def test_usage_counts_prompt_images_and_answer(engine: Engine, pictures: Pictures) -> None:
    usage = engine.stream(ask("a", "b"), pictures, TALKATIVE).usage
    assert (usage.prompt_tokens, usage.visual_tokens) == (len(engine.processor.prompt_ids(ask("a", "b"))), 8)
    running = engine.stream(ask("a"), pictures, TALKATIVE)
    assert running.usage.completion_tokens == 0
    next(running)
    assert 0 < running.usage.completion_tokens < 24
    assert list(running)[-1].finish_reason == "length"
    assert running.usage.completion_tokens == 24


def test_answer_ends_at_the_end_of_the_turn(
    model: NVILAForConditionalGeneration, processor: NVILAProcessor, pictures: Pictures
) -> None:
    plain = Engine(model, processor).stream(ask("a"), pictures, TALKATIVE)
    list(plain)
    ids = plain.token_ids[:20]
    special = set(processor.tokenizer.all_special_ids)
    place = next(i for i, token in enumerate(ids) if i > 4 and token not in special and token not in ids[:i])
    ending = copy.deepcopy(processor)
    ending.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(ids[place])
    running = Engine(model, ending).stream(ask("a"), pictures, TALKATIVE)
    deltas = list(running)
    assert deltas[-1].finish_reason == "stop"
    assert running.usage.completion_tokens == place
    assert text_of(deltas) == processor.tokenizer.decode(ids[:place], skip_special_tokens=True).lstrip()


@pytest.mark.parametrize("listed", [False, True])
def test_answer_ends_where_generate_would_end_it(listed: bool, variant: ChatModel) -> None:
    """What ends a turn may be another token than the one that ends a text of the tokenizer's."""
    question = [Message(role="user", content=(Part(type="text", value="what?"),))]
    engine = Engine(variant.model, variant.processor)
    first = engine.stream(question, {}, SamplingParams(max_tokens=6))
    list(first)
    ids = first.token_ids
    place = next(place for place in range(1, 6) if ids[place] not in ids[:place])
    before = variant.model.generation_config.eos_token_id
    variant.model.generation_config.eos_token_id = [ids[place], 1] if listed else ids[place]
    try:
        running = Engine(variant.model, variant.processor).stream(question, {}, SamplingParams(max_tokens=6))
        said = list(running)
        inputs = model_inputs(engine.processor, question, {})
        generated = cast("Any", variant.model).generate(**inputs, max_new_tokens=6, do_sample=False)
    finally:
        variant.model.generation_config.eos_token_id = before
    assert (running.usage.completion_tokens, said[-1].finish_reason) == (place, "stop")
    assert generated.shape[1] - inputs["input_ids"].shape[1] == place + 1  # it gives back the last token too


def test_every_stop_text_ends_the_answer_before_itself(engine: Engine, pictures: Pictures) -> None:
    """Cut the known answer at each of its pieces in turn: one word, several, and parts of words."""
    full = text_of(answer(engine, ask("a"), pictures, TALKATIVE))
    assert len(full) > 60
    for start in range(3, len(full) - 14, 17):
        for length in (1, 5, 14):
            stop = full[start : start + length]
            params = SamplingParams(max_tokens=24, temperature=3.0, seed=4, stop=("never said", stop))
            deltas = answer(engine, ask("a"), pictures, params)
            assert text_of(deltas) == full[: full.index(stop)], stop
            assert deltas[-1].finish_reason == "stop"


def test_first_of_several_stop_texts_wins(engine: Engine, pictures: Pictures) -> None:
    full = text_of(answer(engine, ask("a"), pictures, TALKATIVE))
    stops = (full[40:44], full[20:26])
    deltas = answer(engine, ask("a"), pictures, SamplingParams(max_tokens=24, temperature=3.0, seed=4, stop=stops))
    assert text_of(deltas) == full[: min(full.index(stop) for stop in stops)]


def test_beginning_of_a_stop_text_at_the_end_is_still_said(engine: Engine, pictures: Pictures) -> None:
    full = text_of(answer(engine, ask("a"), pictures, TALKATIVE))
    params = SamplingParams(max_tokens=24, temperature=3.0, seed=4, stop=(full[-4:] + " and more",))
    deltas = answer(engine, ask("a"), pictures, params)
    assert text_of(deltas) == full
    assert deltas[-1].finish_reason == "length"


def test_seed_fixes_an_answer_and_leaves_other_draws_alone(engine: Engine, pictures: Pictures) -> None:
    def said(seed: int | None) -> str:
        params = SamplingParams(max_tokens=16, temperature=3.0, seed=seed)
        return text_of(answer(engine, ask("a"), pictures, params))

    state = torch.get_rng_state()
    assert said(1) == said(1)
    assert len({said(seed) for seed in range(4)}) == 4
    assert len({said(None) for _ in range(4)}) > 1
    assert torch.equal(torch.get_rng_state(), state)


def draws(logits: list[float], count: int = 800, **params: float) -> list[float]:
    noise = torch.Generator().manual_seed(0)
    values = SamplingParams(**({"temperature": 1.0} | params))  # type: ignore[arg-type]  # numbers only
    drawn = [choose_token(torch.tensor(logits), values, noise) for _ in range(count)]
    return [drawn.count(token) / count for token in range(len(logits))]


LOGITS = [0.0, 2.0, 1.0, -1.0]  # softmax: .087 .644 .237 .032


def test_draws_follow_the_softmax_at_a_temperature() -> None:
    for temperature in (1.0, 0.5, 4.0):
        expected = (torch.tensor(LOGITS) / temperature).softmax(0).tolist()
        assert draws(LOGITS, temperature=temperature) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, {1}), (0.64, {1}), (0.65, {1, 2}), (0.88, {1, 2}), (0.95, {0, 1, 2}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_smallest_sufficient_set(top_p: float, kept: set[int]) -> None:
    shares = draws(LOGITS, top_p=top_p)
    assert {token for token, share in enumerate(shares) if share} == kept
    probabilities = torch.tensor(LOGITS).softmax(0)
    total = sum(float(probabilities[token]) for token in kept)
    expected = [float(p) / total if token in kept else 0.0 for token, p in enumerate(probabilities)]
    assert shares == pytest.approx(expected, abs=0.06)


def test_temperature_zero_is_greedy_whatever_top_p_says() -> None:
    assert draws(LOGITS, count=5, temperature=0.0, top_p=0.5) == [0, 1, 0, 0]


def run_with_limit(work: Callable[[], object]) -> None:
    """Run in a thread, so that a lock left behind fails a test instead of hanging it."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "the engine is not free"


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_cancelled_request_frees_the_engine(engine: Engine, pictures: Pictures, pieces: int) -> None:
    running = engine.stream(ask("a"), pictures, TALKATIVE)
    for _ in range(pieces):
        next(running)
    running.close()
    running.close()
    assert list(running) == []
    assert running.usage.completion_tokens <= pieces + 1
    run_with_limit(lambda: answer(engine, ask("b"), pictures, SamplingParams(max_tokens=2)))


def test_failed_request_frees_the_engine(engine: Engine, pictures: Pictures) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    hook = engine.model.model.language_model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="no memory"):
            answer(engine, ask("a"), pictures, TALKATIVE)
    finally:
        hook.remove()
    run_with_limit(lambda: answer(engine, ask("b"), pictures, SamplingParams(max_tokens=2)))


def test_requests_of_several_threads_do_not_mix(engine: Engine, pictures: Pictures) -> None:
    expected = {key: text_of(answer(engine, ask(key), pictures, TALKATIVE)) for key in "abc"}
    found: dict[str, str] = {}

    def work(key: str) -> None:
        found[key] = text_of(answer(engine, ask(key), pictures, TALKATIVE))

    threads = [threading.Thread(target=work, args=(key,), daemon=True) for key in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected


def test_image_that_was_not_sent_is_named(engine: Engine, pictures: Pictures) -> None:
    with pytest.raises(DataError, match="image 'nowhere' of the conversation was not given"):
        engine.stream(ask("a", "nowhere"), pictures, SamplingParams())


def test_answer_ends_where_the_model_does(engine: Engine, pictures: Pictures) -> None:
    words = "red " * 100
    messages = ask("a", text=words)
    room = engine.max_length - len(engine.processor.prompt_ids(messages))
    assert 0 < room < 24
    running = engine.stream(messages, pictures, TALKATIVE)
    assert list(running)[-1].finish_reason == "length"
    assert running.usage.completion_tokens == room


def test_prompt_without_room_for_an_answer_names_both_lengths(engine: Engine, pictures: Pictures) -> None:
    length = len(engine.processor.prompt_ids(ask("a", text="red " * 200)))
    with pytest.raises(DataError, match=f"the prompt has {length} tokens; the model takes 128"):
        engine.stream(ask("a", text="red " * 200), pictures, SamplingParams())


@pytest.mark.parametrize(
    ("field", "value"), [("max_tokens", 0), ("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1), ("top_p", -1.0)]
)
def test_parameter_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]  # numbers only


def test_wide_and_quantized_folders_are_served(
    saved_model: Path,
    fresh_model: NVILAForConditionalGeneration,
    processor: NVILAProcessor,
    engine: Engine,
    pictures: Pictures,
    tmp_path: Path,
) -> None:
    greedy = SamplingParams(max_tokens=8)
    expected = answer(engine, ask("a"), pictures, greedy)
    assert answer(Engine.load(saved_model), ask("a"), pictures, greedy) == expected
    config = QuantizationConfig(group_size=32)
    quantize_model(fresh_model, config)
    save_quantized(fresh_model, config, tmp_path / "narrow")
    processor.save_pretrained(tmp_path / "narrow")
    narrow = Engine.load(tmp_path / "narrow")
    assert answer(narrow, ask("a"), pictures, greedy) == answer(
        Engine(fresh_model, processor), ask("a"), pictures, greedy
    )
    with pytest.raises(CheckpointError):
        Engine.load(tmp_path / "absent")


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, as the released tokenizers fall back to for rare characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("said", "stop", "expected"),
    [
        ("h\u00e9 \u20ac5 \U0001f600!", (), "h\u00e9 \u20ac5 \U0001f600!"),
        ("one\u20actwo", ("\u20ac",), "one"),
        ("one\n\nStop: two", ("\n\nStop:",), "one"),
        ("aab", ("ab",), "a"),
        ("abcabd", ("abd",), "abc"),
        ("ends in st", ("stop",), "ends in st"),
        ("  led by spaces", (), "led by spaces"),
    ],
)
def test_pieces_hold_back_half_characters_and_half_stops(
    said: str, stop: tuple[str, ...], expected: str, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    text = AnswerText(byte_tokenizer, stop)
    out = ""
    for token in byte_tokenizer(said)["input_ids"]:
        piece = text.add(token)
        assert "\ufffd" not in piece
        out += piece
        assert expected.startswith(out)
        if text.stopped:
            break
    else:
        out += text.rest()
    assert out == expected
