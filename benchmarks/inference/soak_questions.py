"""The soak's model, its questions, and the answers that they must get whatever else is asked at the same time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from nvila.configuration import NVILAConfig
from nvila.data.records import Message, Part
from nvila.data.video import Video, load_video
from nvila.inference.config import EngineConfig
from nvila.inference.decoders import cache_shape
from nvila.inference.engine import Engine, SamplingParams
from nvila.inference.prompt import model_inputs
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

POISON = "poison"
# One of these characters is held by poisoned questions alone: the first one that nobody else's answer has.
_MARKERS = "\x07\x01\x02\x03\x04\x05\x06"
_MAX_TOKENS = 40
_SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["n"]}
_BLOCKS, _BLOCK_SIZE = 90, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question.

    Args:
        name: What kind it is of.
        messages: The conversation.
        media: Its images and videos.
        params: How to answer; the longest answer.
        reference: Tokens of that answer; None for a question that must fail.
    """

    name: str
    messages: Sequence[Message]
    media: Mapping[str, Image.Image | Video]
    params: SamplingParams
    reference: Sequence[int] | None

    def params_for(self, length: int) -> SamplingParams:
        """Return the same parameters for a shorter answer; a constrained one keeps its length."""
        return self.params if self.params.json_schema is not None else replace(self.params, max_tokens=length)

    def judge(self, said: Sequence[int], length: int, *, whole: bool) -> str | None:
        """Return what is wrong with an answer, or None.

        Args:
            said: Its tokens.
            length: The most tokens that it was allowed.
            whole: Whether it was read to its end, so that nothing may be missing.
        """
        if self.reference is None:
            return f"{self.name}: was answered" if whole else None
        expected = list(self.reference)
        if self.params.json_schema is None:
            expected = expected[:length]
        if list(said) == (expected if whole else expected[: len(said)]):
            return None
        return f"{self.name}: said {list(said)[:8]}..., should be {expected[:8]}..."


def build_engine() -> Engine:
    """Build an engine that is too small for its callers."""
    config = NVILAConfig.from_preset("tiny-nvila")
    config.text_config.initializer_range = 0.2  # an untrained model with clear preferences: argmax is no toss-up
    torch.manual_seed(3)
    model = NVILAForConditionalGeneration(config).eval()
    size = _BLOCKS * _BLOCK_SIZE * cache_shape(model).bytes_per_token
    return Engine(
        model,
        NVILAProcessor.from_preset("tiny-nvila"),
        EngineConfig(
            kv_cache_bytes=size,
            block_size=_BLOCK_SIZE,
            media_cache_bytes=64 * 1024,
            max_running=5,
            max_waiting=4,
            step_tokens=96,
            encode_tiles=5,
        ),
    )


def make_questions(engine: Engine) -> list[Question]:
    """Make questions of all kinds, with their answers, and some that are poisoned."""
    good = [_answered(engine, question) for question in _questions(engine)]
    said = {token for question in good for token in question.reference or ()}
    marker = next(one for one in _MARKERS if _token(engine, one) not in said)
    params = SamplingParams(max_tokens=_MAX_TOKENS)
    return good + [_text_question(POISON, f"never {marker} mind {number}", params) for number in range(3)]


def poison(engine: Engine, questions: Sequence[Question]) -> Callable[..., Any]:
    """Make a hook that fails the model, or makes NaN, wherever the marker of poisoned questions is read."""
    weight = cast("Tensor", engine.model.get_input_embeddings().weight)
    text = next(question.messages[0].text for question in questions if question.name == POISON)
    marker = _token(engine, next(one for one in _MARKERS if one in text))
    turn = [0]

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs["inputs_embeds"]
        hit = (embeds == weight[marker]).all(-1)
        if not hit.any():
            return None
        turn[0] += 1
        if turn[0] % 2:
            raise RuntimeError("poisoned")
        return args, kwargs | {"inputs_embeds": embeds.masked_fill(hit[..., None], torch.nan)}

    return hook


def _questions(engine: Engine) -> Iterator[Question]:
    noise = [Image.effect_noise((64, 64), 30 + number).convert("RGB") for number in range(6)]
    media: dict[str, Image.Image | Video] = {f"square{number}": one for number, one in enumerate(noise)}
    media |= {"wide": noise[0].resize((150, 50)), "tall": noise[1].resize((40, 90))}
    frames = engine.model.config.num_video_frames
    media |= {f"film{n}": load_video([noise[(n + i) % 6] for i in range(16)], num_frames=frames) for n in range(2)}
    greedy = SamplingParams(max_tokens=_MAX_TOKENS)

    def ask(name: str, text: str, *keys: str, params: SamplingParams = greedy) -> Question:
        parts = [Part(type="video" if key.startswith("film") else "image", value=key) for key in keys]
        messages = [Message(role="user", content=(*parts, Part(type="text", value=text)))]
        own = {key: media[key] for key in keys}
        return Question(name=name, messages=messages, media=own, params=params, reference=None)

    for number in range(6):
        yield ask("text", f"question {number} " * (1 + 3 * number))
        yield ask("image", "what is it?", f"square{number}")
        yield ask("image again", f"and is it {number}?", f"square{number}")
    for key in ("wide", "tall", "film0", "film1"):
        yield ask(key, "what happens?", key)
    yield ask("several", "which is larger?", "square0", "tall", "square3")
    yield ask("several", "and before?", "film0", "square1")
    for seed in range(3):
        sampled = SamplingParams(max_tokens=_MAX_TOKENS, temperature=1.5, top_p=0.9, seed=seed)
        yield ask("sampled", "tell me", params=sampled)
    bound = SamplingParams(max_tokens=_MAX_TOKENS, json_schema=json.dumps(_SCHEMA))
    yield ask("schema", "how many?", "square2", params=bound)


def _text_question(name: str, text: str, params: SamplingParams) -> Question:
    messages = [Message(role="user", content=(Part(type="text", value=text),))]
    return Question(name=name, messages=messages, media={}, params=params, reference=None)


def _token(engine: Engine, character: str) -> int:
    return int(engine.processor.tokenizer(character, add_special_tokens=False)["input_ids"][-1])


def _answered(engine: Engine, question: Question) -> Question:
    """Add the answer that `generate` gives; of sampled and constrained ones the answer that the engine gives alone."""
    if question.params.plain_greedy:
        inputs = model_inputs(engine.processor, question.messages, question.media)
        out = cast("Any", engine.model).generate(
            **inputs, max_new_tokens=question.params.max_tokens, do_sample=False, eos_token_id=sorted(engine.stop_ids)
        )
        said = [token for token in out[0, inputs["input_ids"].shape[1] :].tolist() if token not in engine.stop_ids]
    else:
        running = engine.stream(question.messages, question.media, question.params)
        list(running)
        said = running.token_ids
    return replace(question, reference=said)
