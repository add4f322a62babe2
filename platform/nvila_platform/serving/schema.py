"""Requests and responses in OpenAI shape.

A field that is not implemented is refused by name unless its value asks for nothing: an answer that silently ignored
a setting would be worse than an error. A null is the same as leaving the field out, as in OpenAI's own API.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer, model_validator

from nvila.errors import nearest
from nvila_platform.serving.errors import ApiError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from nvila.inference.engine import SamplingParams, TokenLogprob, Usage

# Sent by clients for bookkeeping at the far end; leaving them out changes no answer.
_IGNORED = frozenset(
    {"metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "user"}
)
# Not implemented, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
_MAX_STOPS = 4
_INT64 = 2**63
# JSON has no infinity; OpenAI reports tokens that cannot come so.
_LEAST_LOGPROB = -9999.0


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(_Strict):
    """Literal text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where the image is: here, always the image itself as a `data:` URI."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Strict):
    """One image."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(_Strict):
    """One turn; plain text content is read as one text part."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] = Field(min_length=1)
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, raw: Any) -> Any:
        # Clients send an earlier answer back as they got it, with null for each kind of content it did not have.
        return {key: value for key, value in raw.items() if value is not None} if isinstance(raw, dict) else raw

    @field_validator("content", mode="before")
    @classmethod
    def _text_as_part(cls, raw: Any) -> Any:
        return [{"type": "text", "text": raw}] if isinstance(raw, str) else raw

    @model_validator(mode="after")
    def _images_from_users(self) -> ChatMessage:
        if self.role != "user" and any(isinstance(part, ImagePart) for part in self.content):
            raise ValueError(f"only user messages may hold images, this one is from {self.role}")
        return self


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchema(_Strict):
    """The schema that an answer follows."""

    # `schema` is a method of the base class.
    body: dict[str, Any] = Field(default={}, alias="schema")
    name: str = ""
    description: str = ""
    # An answer never leaves its schema here.
    strict: bool = True


class ResponseFormat(_Strict):
    """Which form an answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_given(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and the type to it")
        return self

    def schema_text(self) -> str | None:
        """The schema as a text; None for answers of any form."""
        if self.type == "text":
            return None
        return json.dumps({"type": "object"} if self.json_schema is None else self.json_schema.body)


class ChatRequest(_Strict):
    """Body of `POST /chat/completions`."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    stop: list[str] = Field(default=[], max_length=_MAX_STOPS)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    response_format: ResponseFormat | None = None
    # As in vLLM; OpenAI's own API has no such fields.
    top_k: int | None = Field(default=None, ge=-1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    n: Literal[1] = 1

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, raw: Any) -> Any:
        return [raw] if isinstance(raw, str) else raw

    @field_validator("stop")
    @classmethod
    def _stops_not_empty(cls, stops: list[str]) -> list[str]:
        if "" in stops:
            raise ValueError("a stop text must not be empty")
        return stops

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be from the user")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed together with stream: true")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed together with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        return self

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate, under either of its names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling(self) -> SamplingParams:
        """The engine's parameters; what the request leaves open keeps the engine's default."""
        from nvila.inference.engine import SamplingParams

        chosen: dict[str, Any] = {
            "max_tokens": self.token_limit,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": tuple(self.stop) or None,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "logprobs": self.top_logprobs if self.logprobs else None,
            "json_schema": None if self.response_format is None else self.response_format.schema_text(),
        }
        return SamplingParams(**{key: value for key, value in chosen.items() if value is not None})


def parse_chat(raw: Any) -> ChatRequest:
    """Check a decoded JSON body.

    Raises:
        ApiError: 400 naming the first field at fault and what it may hold.
    """
    if not isinstance(raw, dict):
        raise ApiError(400, "invalid_request", f"the body must be a JSON object, got {type(raw).__name__}")
    body = {key: value for key, value in raw.items() if value is not None and key not in _IGNORED}
    for name in sorted(body.keys() & _UNSUPPORTED.keys()):
        if body.pop(name) not in _UNSUPPORTED[name]:
            raise ApiError(400, "unsupported_parameter", f"'{name}' is not supported by this server", param=name)
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as e:
        raise _as_api_error(e.errors(include_url=False)[0]) from e


def _as_api_error(error: ErrorDetails) -> ApiError:
    where, name = _path(error["loc"]), str(error["loc"][-1]) if error["loc"] else ""
    kind, text = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        known = {*ChatRequest.model_fields, *_IGNORED, *_UNSUPPORTED} if len(error["loc"]) == 1 else set()
        hint = f"; {nearest(name, known)}" if known else ""
        return ApiError(400, "unknown_parameter", f"unknown field '{where}'{hint}", param=where)
    if kind == "missing":
        return ApiError(400, "missing_parameter", f"'{where}' is required", param=where)
    if where == "n":
        return ApiError(400, "unsupported_parameter", "only n=1 is supported; send one request per answer", param="n")
    if kind == "union_tag_invalid":
        tag = str(error.get("ctx", {}).get("tag", ""))[:40]
        message = f"content of type '{tag}' is not supported; use 'text' or 'image_url'"
        return ApiError(400, "unsupported_content", message, param=where)
    return ApiError(400, "invalid_parameter", f"{where}: {text}" if where else text, param=where or None)


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for index, step in enumerate(loc):
        if index > 1 and loc[index - 2] == "content" and isinstance(loc[index - 1], int):
            continue  # pydantic's name of the union member, not a key of the request
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path


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
        """Convert the engine's counts."""
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=UsageDetails(image_tokens=usage.visual_tokens, cached_tokens=usage.cached_tokens),
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
    """One answer; there is always exactly one."""

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


class ModelCard(BaseModel):
    """One entry of `GET /models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nvila"
    version: str
    digest: str


class ModelList(BaseModel):
    """Body of `GET /models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
