"""The inference engine: one conversation in, a stream of text out.

One request runs at a time; a caller that wants several queues them in front. Decoding is a plain loop over the
model's key-value cache, so a request can be cancelled between any two tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from nvila.assembly import load_model
from nvila.data.records import Message, Part
from nvila.errors import ConfigError, DataError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

if TYPE_CHECKING:
    from PIL import Image

    from nvila.data.video import Video

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen.

    Args:
        max_tokens: Most tokens of an answer.
        temperature: 0 takes the likeliest token; larger values flatten the distribution.
        top_p: Sample from the smallest set of tokens with at least this probability together.
        seed: Fixes the draws of one request.
        stop: Texts that end the answer; they are not part of it.

    Raises:
        ConfigError: A value is out of range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}", "use 1 or more")
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}", "use 0 for greedy or a positive number")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}", "use a number above 0, at most 1")


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of an answer; the last one carries the reason it ended."""

    text: str
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Usage:
    """Tokens of a request so far; `prompt_tokens` includes the visual ones."""

    prompt_tokens: int = 0
    visual_tokens: int = 0
    completion_tokens: int = 0


class Generation:
    """A running request: iterate for deltas, `close` to cancel. `usage` stays readable afterwards."""

    def __init__(self, deltas: Iterator[Delta], usage: Usage) -> None:
        self.usage = usage
        self._deltas = deltas

    def __iter__(self) -> Iterator[Delta]:
        return self._deltas

    def __next__(self) -> Delta:
        return next(self._deltas)

    def close(self) -> None:
        """Cancel the request and free the engine for the next one."""
        close = getattr(self._deltas, "close", None)
        if close is not None:
            close()


class Engine:
    """A loaded model that answers conversations.

    Args:
        model: Model in evaluation mode.
        processor: Its processor.
    """

    def __init__(self, model: NVILAForConditionalGeneration, processor: NVILAProcessor) -> None:
        self.model = model
        self.processor = processor
        self.max_length = int(processor.tokenizer.model_max_length)
        self._placeholders = torch.tensor([model.config.image_token_id, model.config.video_token_id])
        self._stop_ids = {processor.tokenizer.eos_token_id, *_as_ids(model.generation_config.eos_token_id)}
        self._lock = threading.Lock()

    @classmethod
    def load(cls, path: Path) -> Engine:
        """Load a model folder, wide or quantized.

        Raises:
            CheckpointError: The folder is not a complete model.
        """
        return cls(*load_model(path))

    def stream(
        self, messages: Sequence[Message], images: Mapping[str, Image.Image | Video], params: SamplingParams
    ) -> Generation:
        """Answer a conversation.

        The prompt is the one that the processor makes for `chat`: a single image is tiled as the model was trained.

        Args:
            messages: The conversation; image and video parts hold keys of `images`.
            images: Decoded images, and videos.
            params: How to choose tokens.

        Returns:
            The running request; the model works from the first iteration on.

        Raises:
            DataError: An image is missing, or the prompt leaves no room for an answer.
        """
        inputs = self._inputs(messages, images)
        ids = inputs["input_ids"]
        length = ids.shape[1]
        room = self.max_length - length
        if room < 1:
            raise DataError(
                f"the prompt has {length} tokens; the model takes {self.max_length} with its answer",
                "shorten the text or send fewer images",
            )
        usage = Usage(prompt_tokens=length, visual_tokens=int(torch.isin(ids, self._placeholders).sum()))
        return Generation(self._deltas(inputs, params, min(room, params.max_tokens), usage), usage)

    def _inputs(self, messages: Sequence[Message], media: Mapping[str, Image.Image | Video]) -> dict[str, Tensor]:
        """Return `input_ids` and the tensors of the media; one prompt needs no mask."""

        def content(part: Part) -> dict[str, object]:
            if part.type != "text" and part.value not in media:
                raise DataError(f"{part.type} '{part.value}' of the conversation was not given", "send every medium")
            return {"type": part.type, part.type: part.value if part.type == "text" else media[part.value]}

        conversation = [
            {"role": message.role, "content": [content(part) for part in message.content]} for message in messages
        ]
        inputs = self.processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        inputs.pop("attention_mask")
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    def _deltas(
        self, inputs: Mapping[str, Tensor], params: SamplingParams, limit: int, usage: Usage
    ) -> Iterator[Delta]:
        text = _AnswerText(self.processor, params.stop)
        with self._lock:
            for token in self._tokens(inputs, params):
                if token in self._stop_ids:
                    yield Delta(text.rest(), "stop")
                    return
                usage.completion_tokens += 1
                piece = text.add(token)
                if text.stopped:
                    yield Delta(piece, "stop")
                    return
                if usage.completion_tokens >= limit:
                    yield Delta(piece + text.rest(), "length")
                    return
                if piece:
                    yield Delta(piece)

    @torch.inference_mode()
    def _step(self, inputs: Mapping[str, Tensor], cache: DynamicCache) -> Tensor:
        """Feed tokens, the prompt with its media, and return the logits (V) of the next one."""
        out = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[0, -1].float().cpu()
        return logits

    def _tokens(self, inputs: Mapping[str, Tensor], params: SamplingParams) -> Iterator[int]:
        noise = torch.Generator()
        if params.seed is None:
            noise.seed()
        else:
            noise.manual_seed(params.seed)
        cache = DynamicCache(config=self.model.config.text_config)
        logits = self._step(inputs, cache)
        while True:
            token = choose_token(logits, params, noise)
            yield token
            logits = self._step({"input_ids": torch.tensor([[token]], device=self.model.device)}, cache)


def _as_ids(eos: int | Sequence[int] | None) -> Sequence[int]:
    return () if eos is None else (eos,) if isinstance(eos, int) else eos


def choose_token(logits_V: Tensor, params: SamplingParams, noise: torch.Generator) -> int:
    """Pick the next token from its logits."""
    if params.temperature == 0:
        return int(logits_V.argmax())
    probabilities = (logits_V / params.temperature).softmax(-1)
    if params.top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        # A token stays when those before it have not reached top_p yet, so the likeliest always stays.
        dropped = index[ordered.cumsum(-1) - ordered >= params.top_p]
        probabilities = probabilities.index_fill(0, dropped, 0.0)
    return int(torch.multinomial(probabilities, 1, generator=noise))


class _AnswerText:
    """Decodes an answer piece by piece and holds back what may become a stop text or a half character."""

    def __init__(self, processor: NVILAProcessor, stop: tuple[str, ...]) -> None:
        self._tokenizer = processor.tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._sent = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """Add a token and return the text that is now certain."""
        self._ids.append(token)
        text = self._text()
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._send(text[: min(found)])
        if text.endswith("\ufffd"):
            return ""
        return self._send(text[: len(text) - self._held_back(text)])

    def rest(self) -> str:
        """Return what was held back, when the answer ends without a stop text."""
        return self._send(self._text())

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).lstrip()

    def _held_back(self, text: str) -> int:
        longest = max((len(stop) for stop in self._stop), default=0)
        for length in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0

    def _send(self, text: str) -> str:
        piece, self._sent = text[self._sent :], max(self._sent, len(text))
        return piece


__all__ = ["Delta", "Engine", "Generation", "SamplingParams", "Usage", "choose_token"]
