"""Answers in OpenAI shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, model_serializer

if TYPE_CHECKING:
    from nvila.inference.engine import TokenLogprob, Usage

# JSON has no infinity; OpenAI reports tokens that cannot come so.
_LEAST_LOGPROB = -9999.0


class UsageDetails(BaseModel):
    """Where the prompt tokens came from."""

    cached_tokens: int = 0
    image_tokens: int = 0


class ChatUsage(BaseModel):
    """Token counts of one answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: UsageDetails

    @classmethod
    def of(cls, usage: Usage) -> ChatUsage:
        """Convert the engine's counts of one answer."""
        return cls.over([[usage]])

    @classmethod
    def over(cls, prompts: Sequence[Sequence[Usage]]) -> ChatUsage:
        """Add up the answers to several prompts; a prompt that is answered several times counts once."""
        firsts = [answers[0] for answers in prompts]
        prompt_tokens = sum(first.prompt_tokens for first in firsts)
        completion_tokens = sum(usage.completion_tokens for answers in prompts for usage in answers)
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=UsageDetails(
                image_tokens=sum(first.visual_tokens for first in firsts),
                cached_tokens=sum(first.cached_tokens for first in firsts),
            ),
        )


class TopLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]

    @classmethod
    def of(cls, token: str, logprob: float) -> TopLogprob:
        """Convert one of the engine's pairs."""
        return cls(token=token, logprob=max(logprob, _LEAST_LOGPROB), bytes=list(token.encode()))


class ContentLogprob(TopLogprob):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob] = []


class ChoiceLogprobs(BaseModel):
    """Log-probabilities of an answer or of a piece of it."""

    content: list[ContentLogprob]

    @classmethod
    def of(cls, tokens: Sequence[TokenLogprob]) -> ChoiceLogprobs:
        """Convert the engine's."""
        return cls(
            content=[
                ContentLogprob(
                    **TopLogprob.of(one.text, one.logprob).model_dump(),
                    top_logprobs=[TopLogprob.of(*pair) for pair in one.top],
                )
                for one in tokens
            ]
        )


class AnswerMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """One of the answers."""

    index: int = 0
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str


class ChatCompletion(BaseModel):
    """Body of an answer that is not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: ChatUsage


class ChunkDelta(BaseModel):
    """What one chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _only_what_is_said(self) -> dict[str, str]:
        # Clients join every `content` they find, so an absent one must be absent, not null.
        return {key: value for key, value in (("role", self.role), ("content", self.content)) if value is not None}


class ChunkChoice(BaseModel):
    """The answer's share of one chunk."""

    index: int = 0
    delta: ChunkDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(BaseModel):
    """One event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: ChatUsage | None = None


class TextLogprobs(BaseModel):
    """Log-probabilities of a text completion, as lists side by side."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]

    @classmethod
    def of(cls, tokens: Sequence[TokenLogprob], start: int = 0) -> TextLogprobs:
        """Convert the engine's; `start` is where the first token stands in the text."""
        offsets = []
        for one in tokens:
            offsets.append(start)
            start += len(one.text)
        return cls(
            tokens=[one.text for one in tokens],
            token_logprobs=[max(one.logprob, _LEAST_LOGPROB) for one in tokens],
            top_logprobs=[{text: max(value, _LEAST_LOGPROB) for text, value in one.top} for one in tokens],
            text_offset=offsets,
        )


class TextChoice(BaseModel):
    """One of the answers of a text completion, or a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None


class TextCompletion(BaseModel):
    """Body of a text completion; also, with pieces of text, one event of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: ChatUsage | None = None


class ModelCard(BaseModel):
    """One entry of `GET /models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nvila"
    version: str
    digest: str
    # As in vLLM: what an adapter belongs to.
    root: str
    parent: str | None = None


class ModelList(BaseModel):
    """Body of `GET /models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
