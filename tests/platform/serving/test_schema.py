"""The request schema: what OpenAI clients send is read, what we do not implement is refused by name."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from nvila.data.records import Message
from nvila.errors import ConfigError, DataError, InfrastructureError
from nvila.inference.sampling import SamplingParams
from nvila_platform.serving.decoder_pool import DecoderPool
from nvila_platform.serving.errors import ApiError, as_api_error
from nvila_platform.serving.identity import ModelIdentity
from nvila_platform.serving.limits import Limits
from nvila_platform.serving.media import MediaIntake, Medium
from nvila_platform.serving.schema import ChatRequest, parse_chat, parse_completion
from nvila_platform.serving.service import read_conversation

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def conversation(request: ChatRequest, limits: Limits | None = None) -> tuple[list[Message], dict[str, Medium]]:
    limits = limits or Limits(decode_workers=1)
    pool = DecoderPool(limits)
    try:
        return asyncio.run(read_conversation(request.messages, MediaIntake(limits, pool), 8))
    finally:
        pool.close()


def refusal(body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_chat(body)
    assert caught.value.status == 400
    return caught.value


def test_plain_text_content_is_one_text_part() -> None:
    messages, images = conversation(parse_chat(ASK))
    assert [(part.type, part.value) for part in messages[0].content] == [("text", "hi")]
    assert images == {}


def test_sampling_fields_reach_the_engine() -> None:
    params = parse_chat(
        ASK | {"max_completion_tokens": 5, "temperature": 1, "top_p": 0.5, "seed": -3, "stop": "x"}
    ).sampling()
    assert (params.max_tokens, params.temperature, params.top_p, params.seed) == (5, 1, 0.5, -3)
    assert params.stop == ("x",)
    assert (params.logprobs, params.json_schema) == (None, None)
    params = parse_chat(
        ASK
        | {"presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.5, "top_k": 3}
        | {"logprobs": True, "top_logprobs": 2}
    ).sampling()
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -1, 1.5)
    assert (params.top_k, params.logprobs) == (3, 2)
    assert parse_chat(ASK | {"logprobs": True, "top_k": -1}).sampling() == SamplingParams(logprobs=0, top_k=0)


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "array"}}},
            {"type": "array"},
        ),
    ],
)
def test_response_formats_become_schemas(form: dict[str, Any], schema: dict[str, Any] | None) -> None:
    found = parse_chat(ASK | {"response_format": form}).sampling().json_schema
    assert (None if found is None else json.loads(found)) == schema


def test_what_is_left_out_keeps_the_engines_defaults() -> None:
    assert parse_chat(ASK).sampling() == SamplingParams()


def test_developer_is_system_and_an_earlier_answer_may_carry_nulls() -> None:
    body = ASK | {
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": "q", "name": "ann"},
            {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "audio": None},
            {"role": "user", "content": [{"type": "text", "text": "q2"}]},
        ]
    }
    messages, _ = conversation(parse_chat(body))
    assert [message.role for message in messages] == ["system", "user", "assistant", "user"]


def test_the_same_image_twice_is_decoded_once(png_url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": png_url, "detail": "low"}}
    request = parse_chat(ASK | {"messages": [{"role": "user", "content": [part, part]}]})
    messages, images = conversation(request)
    assert len(images) == 1
    assert [part.value for part in messages[0].content] == ["medium-0", "medium-0"]


def test_too_many_images_are_refused(png_url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": png_url}}
    request = parse_chat(ASK | {"messages": [{"role": "user", "content": [part] * 3}]})
    with pytest.raises(ApiError, match="at most 2") as caught:
        conversation(request, Limits(max_images=2))
    assert caught.value.code == "too_many_images"


@pytest.mark.parametrize(
    "field",
    [
        {"user": "ann"},
        {"metadata": {"a": "b"}},
        {"tools": []},
        {"tool_choice": "none"},
        {"logprobs": False},
        {"frequency_penalty": 0},
        {"presence_penalty": 0.0},
        {"response_format": {"type": "text"}},
        {"store": False},
        {"n": 1},
        {"stop": None, "seed": None, "tools": None},
    ],
    ids=lambda field: "-".join(field),
)
def test_fields_that_ask_for_nothing_are_tolerated(field: dict[str, Any]) -> None:
    assert parse_chat(ASK | field).model == "m"


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"functions": [{"name": "f"}]},
        {"logit_bias": {"50256": -100}},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
        {"store": True},
        {"reasoning_effort": "high"},
    ],
    ids=lambda field: "-".join(field),
)
def test_unsupported_fields_are_refused_by_name(field: dict[str, Any]) -> None:
    error = refusal(ASK | field)
    (name,) = field
    assert (error.code, error.param) == ("unsupported_parameter", name)
    assert name in error.message


@pytest.mark.parametrize(
    ("change", "code", "param", "says"),
    [
        ({"temprature": 1}, "unknown_parameter", "temprature", "did you mean 'temperature'"),
        ({"messages": None}, "missing_parameter", "messages", "required"),
        ({"model": None}, "missing_parameter", "model", "required"),
        ({"top_logprobs": 3}, "invalid_parameter", None, "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_parameter", "top_logprobs", "20"),
        ({"presence_penalty": 3}, "invalid_parameter", "presence_penalty", "2"),
        ({"repetition_penalty": 0}, "invalid_parameter", "repetition_penalty", "0"),
        ({"response_format": {"type": "json_schema"}}, "invalid_parameter", "response_format", "json_schema"),
        ({"response_format": {"type": "xml"}}, "invalid_parameter", "response_format.type", "json_object"),
        ({"messages": []}, "invalid_parameter", "messages", "at least 1"),
        ({"messages": "hi"}, "invalid_parameter", "messages", "list"),
        ({"messages": [{"role": "user"}]}, "missing_parameter", "messages[0].content", "required"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_parameter", "messages[0].role", "'user'"),
        ({"messages": [{"role": "user", "content": []}]}, "invalid_parameter", "messages[0].content", "at least 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "unsupported_content",
            "messages[0].content[0]",
            "input_audio",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"uri": "x"}}]}]},
            "missing_parameter",
            "messages[0].content[0].image_url.url",
            "required",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
            "unknown_parameter",
            "messages[0].tool_calls",
            "tool_calls",
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "invalid_parameter", None, "last message"),
        ({"n": 0}, "invalid_parameter", "n", "greater"),
        ({"max_tokens": 0}, "invalid_parameter", "max_tokens", "greater"),
        ({"max_tokens": "9"}, "invalid_parameter", "max_tokens", "integer"),
        ({"max_tokens": True}, "invalid_parameter", "max_tokens", "integer"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "invalid_parameter", None, "differ"),
        ({"temperature": 2.5}, "invalid_parameter", "temperature", "less than or equal to 2"),
        ({"temperature": float("nan")}, "invalid_parameter", "temperature", "finite"),
        ({"top_p": 0}, "invalid_parameter", "top_p", "greater than 0"),
        ({"seed": 2**63}, "invalid_parameter", "seed", "less"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "invalid_parameter", "stop", "at most 4"),
        ({"stop": [""]}, "invalid_parameter", "stop", "empty"),
        ({"stream": "yes"}, "invalid_parameter", "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "invalid_parameter", None, "stream: true"),
    ],
)
def test_invalid_fields_are_named(change: dict[str, Any], code: str, param: str | None, says: str) -> None:
    error = refusal(ASK | change)
    assert (error.code, error.param) == (code, param)
    assert says in error.message


@pytest.mark.parametrize("body", [[], "text", 3, None], ids=["list", "text", "number", "null"])
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    assert "JSON object" in refusal(body).message


def test_only_users_send_images(png_url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": png_url}}
    error = refusal(ASK | {"messages": [{"role": "system", "content": [part]}, *ASK["messages"]]})
    assert "only user messages" in error.message


@pytest.mark.parametrize(
    ("error", "status", "passed_on"),
    [
        (DataError("too long", "shorten it"), 400, True),
        (InfrastructureError("store is away"), 503, True),
        (RuntimeError("secret"), 500, False),
        (OSError(2, "secret", "/etc/path"), 500, False),
    ],
    ids=["data", "infrastructure", "runtime", "os"],
)
def test_only_messages_meant_for_users_reach_them(error: Exception, status: int, passed_on: bool) -> None:
    answer = as_api_error(error)
    assert answer.status == status
    assert (str(error) in answer.message) is passed_on
    assert "secret" not in answer.message


def test_protocol_paths_get_the_error_as_text() -> None:
    error = ApiError(400, "c", "wrong", param="inputs")
    assert error.body_for("/v2/models/m/infer") == {"error": "wrong [inputs]"}
    assert error.body_for("/openai/v1/models")["error"]["code"] == "c"


@pytest.mark.parametrize(
    "fields",
    [{"name": "a/b"}, {"name": ""}, {"name": "m", "version": "1\r\nx: y"}, {"name": "m", "digest": ""}],
    ids=["slash", "empty", "header-injection", "no-digest"],
)
def test_identities_that_break_urls_or_headers_are_refused(fields: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        ModelIdentity(**fields)  # type: ignore[arg-type]


def test_limits_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="max_requests"):
        Limits(max_requests=0)


def test_every_answer_draws_for_itself_and_a_seed_fixes_them_all() -> None:
    request = parse_chat(ASK | {"n": 3, "seed": 2**63 - 2})
    assert [request.sampling(choice).seed for choice in range(3)] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert parse_chat(ASK | {"n": 3}).sampling(2).seed is None


def test_videos_and_lists_of_frames_are_parts_of_a_message(png_url: str) -> None:
    parts = [{"type": "video", "video": [png_url] * 3, "fps": 2.0}, {"type": "text", "text": "what moves?"}]
    messages, media = conversation(parse_chat(ASK | {"messages": [{"role": "user", "content": parts}]}))
    assert [part.type for part in messages[0].content] == ["video", "text"]
    (video,) = media.values()
    assert getattr(video, "timestamps", None) == (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({}, "missing_parameter", "prompt"),
        ({"prompt": []}, "invalid_parameter", "prompt"),
        ({"prompt": [[1, 2]]}, "invalid_parameter", "prompt[0]"),
        ({"prompt": "x", "echo": True}, "unsupported_parameter", "echo"),
        ({"prompt": "x", "suffix": "y"}, "unsupported_parameter", "suffix"),
        ({"prompt": "x", "best_of": 2}, "unsupported_parameter", "best_of"),
        ({"prompt": "x", "logprobs": 9}, "invalid_parameter", "logprobs"),
        ({"prompt": "x", "messages": []}, "unknown_parameter", "messages"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_text_completions_are_checked_likewise(change: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion({"model": "m"} | change)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)


def test_each_prompt_of_a_text_completion_is_a_turn_of_its_own() -> None:
    request = parse_completion({"model": "m", "prompt": ["a", "b"], "logprobs": 2})
    assert [chat[0].content for chat in request.chats()] == [
        parse_chat(ASK | {"messages": [{"role": "user", "content": text}]}).messages[0].content for text in "ab"
    ]
    assert request.sampling().logprobs == 2
