"""Requests in OpenAI shape.

A field that is not implemented is refused by name unless its value asks for nothing: an answer that silently ignored
a setting would be worse than an error. A null is the same as leaving the field out, as in OpenAI's own API.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from nvila.errors import nearest
from nvila_platform.serving.content import ChatMessage, Strict
from nvila_platform.serving.errors import ApiError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from nvila.inference.engine import SamplingParams

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
# The same of text completions.
_UNSUPPORTED_TEXT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "logit_bias": ({},),
    "suffix": ("",),
}
_MAX_STOPS = 4
# Of a name that the client chose, in an error.
_SHOWN = 200
_MAX_CHOICES = 128
_INT64 = 2**63


_Request = TypeVar("_Request", bound="GenerationRequest")


class StreamOptions(Strict):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchema(Strict):
    """The schema that an answer follows."""

    # `schema` is a method of the base class.
    body: dict[str, Any] = Field(default={}, alias="schema")
    name: str = ""
    description: str = ""
    # An answer never leaves its schema here.
    strict: bool = True


class ResponseFormat(Strict):
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


class GenerationRequest(Strict):
    """What chat and text completions have in common."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=_MAX_CHOICES)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    stop: list[str] = Field(default=[], max_length=_MAX_STOPS)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    # As in vLLM; OpenAI's own API has no such fields.
    top_k: int | None = Field(default=None, ge=-1)
    repetition_penalty: float | None = Field(default=None, gt=0)

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
    def _options_of_streams(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed together with stream: true")
        return self

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, choice: int = 0) -> SamplingParams:
        """The engine's parameters; what the request leaves open keeps the engine's default.

        Args:
            choice: Number of the answer; each has draws of its own, and a seed fixes them all.
        """
        from nvila.inference.engine import SamplingParams

        seed = None if self.seed is None else (self.seed + choice + _INT64) % (2 * _INT64) - _INT64
        chosen: dict[str, Any] = {
            "max_tokens": self.token_limit,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": seed,
            "stop": tuple(self.stop) or None,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            **self._reporting(),
        }
        return SamplingParams(**{key: value for key, value in chosen.items() if value is not None})

    def _reporting(self) -> dict[str, Any]:
        return {}


class ChatRequest(GenerationRequest):
    """Body of `POST /chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be from the user")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed together with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        return self

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate, under either of its names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def _reporting(self) -> dict[str, Any]:
        return {
            "logprobs": self.top_logprobs if self.logprobs else None,
            "json_schema": None if self.response_format is None else self.response_format.schema_text(),
        }


class CompletionRequest(GenerationRequest):
    """Body of `POST /completions`; a prompt is one turn of a user."""

    prompt: list[str] = Field(min_length=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, raw: Any) -> Any:
        return [raw] if isinstance(raw, str) else raw

    def chats(self) -> list[list[ChatMessage]]:
        """The conversation of every prompt."""
        return [[ChatMessage.model_validate({"role": "user", "content": prompt})] for prompt in self.prompt]

    def _reporting(self) -> dict[str, Any]:
        return {"logprobs": self.logprobs}


def parse_chat(raw: Any) -> ChatRequest:
    """Check the decoded JSON body of a chat.

    Raises:
        ApiError: 400 naming the first field at fault and what it may hold.
    """
    return _parse(ChatRequest, raw, _UNSUPPORTED)


def parse_completion(raw: Any) -> CompletionRequest:
    """Check the decoded JSON body of a text completion.

    Raises:
        ApiError: 400 naming the first field at fault and what it may hold.
    """
    return _parse(CompletionRequest, raw, _UNSUPPORTED_TEXT)


def _parse(kind: type[_Request], raw: Any, unsupported: dict[str, tuple[Any, ...]]) -> _Request:
    if not isinstance(raw, dict):
        raise ApiError(400, "invalid_request", f"the body must be a JSON object, got {type(raw).__name__}")
    body = {key: value for key, value in raw.items() if value is not None and key not in _IGNORED}
    for name in sorted(body.keys() & unsupported.keys()):
        if body.pop(name) not in unsupported[name]:
            raise ApiError(400, "unsupported_parameter", f"'{name}' is not supported by this server", param=name)
    try:
        return kind.model_validate(body)
    except ValidationError as e:
        known = {*kind.model_fields, *_IGNORED, *unsupported}
        raise _as_api_error(e.errors(include_url=False)[0], known) from e


def _as_api_error(error: ErrorDetails, fields: set[str]) -> ApiError:
    where, name = _path(error["loc"])[:_SHOWN], str(error["loc"][-1])[:_SHOWN] if error["loc"] else ""
    kind, text = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        known = fields if len(error["loc"]) == 1 else set()
        hint = f"; {nearest(name, known)}" if known else ""
        return ApiError(400, "unknown_parameter", f"unknown field '{where}'{hint}", param=where)
    if kind == "missing":
        return ApiError(400, "missing_parameter", f"'{where}' is required", param=where)
    if kind == "union_tag_invalid":
        tag = str(error.get("ctx", {}).get("tag", ""))[:40]
        message = f"content of type '{tag}' is not supported; use 'text', 'image_url', 'video_url' or 'video'"
        return ApiError(400, "unsupported_content", message, param=where)
    return ApiError(400, "invalid_parameter", f"{where}: {text}" if where else text, param=where or None)


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for index, step in enumerate(loc):
        if index > 1 and loc[index - 2] == "content" and isinstance(loc[index - 1], int):
            continue  # pydantic's name of the union member, not a key of the request
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path
