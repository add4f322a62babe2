"""The OpenAI endpoints of a running server, asked by the official client and by hand."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from nvila_platform.serving import RunningServer

CHAT = "/openai/v1/chat/completions"
# As in conftest.py.
VERSION, DIGEST, CAPACITY = "7", "sha256:0123456789abcdef0123", 3


def body(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "words", "messages": [{"role": "user", "content": text}], **fields}


def metric(http: httpx.Client, name: str) -> float:
    """The value of one series of /metrics, summed over its labels."""
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    http_client = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=server.openai_url, api_key="none", max_retries=0, http_client=http_client) as made:
        yield made


def test_the_official_client_gets_an_answer_about_an_image(client: openai.OpenAI, png_url: str) -> None:
    answer = client.chat.completions.create(
        model="words",
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": png_url}},
                    {"type": "text", "text": "what is this"},
                ],
            }
        ],
    )
    assert answer.choices[0].message.content == "30x20 what is this"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.model == "words"
    assert answer.system_fingerprint == f"v{VERSION}-0123456789abcdef"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (19, 4, 23)


def test_streaming_gives_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(**body("count 4"), stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert [text for text in texts if text] == ["0", " 1", " 2", " 3"]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_several_answers_stream_beside_each_other(client: openai.OpenAI) -> None:
    message: Any = {"role": "user", "content": "count 4"}
    stream = client.chat.completions.create(
        model="words", messages=[message], n=3, stream=True, stream_options={"include_usage": True}
    )
    texts = [""] * 3
    reasons: dict[int, str] = {}
    usage: Any = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == ["0 1 2 3"] * 3
    assert reasons == dict.fromkeys(range(3), "stop")
    # The prompt counts once, whatever the number of answers.
    assert (usage.prompt_tokens, usage.completion_tokens) == (2, 12)


def test_include_usage_adds_one_last_chunk_without_choices(client: openai.OpenAI) -> None:
    create: Any = client.chat.completions.create
    chunks = list(create(**body("count 4"), stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


def test_a_stream_is_server_sent_events_ended_by_done(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=body("count 2", stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    first, last = (json.loads(event.removeprefix("data: ")) for event in (events[0], events[-2]))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")


def test_tokens_are_sent_as_they_are_made(http: httpx.Client) -> None:
    arrivals = []
    with http.stream("POST", CHAT, json=body("slow 8", stream=True)) as answer:
        for line in answer.iter_lines():
            if line:
                arrivals.append(time.monotonic())
    assert arrivals[-1] - arrivals[0] > 0.2


def test_sampling_fields_arrive_at_the_engine(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        **body("params"), max_completion_tokens=9, temperature=0.5, top_p=0.9, seed=4, stop=["a", "b"]
    )
    text = answer.choices[0].message.content or ""
    for part in ("max_tokens=9", "temperature=0.5", "top_p=0.9", "seed=4", "stop=('a', 'b')"):
        assert part in text


def test_max_tokens_and_stop_end_the_answer(client: openai.OpenAI) -> None:
    cut = client.chat.completions.create(**body("count 9"), max_tokens=3).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("0 1 2", "length")
    stopped = client.chat.completions.create(**body("count 9"), stop="4").choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("0 1 2 3", "stop")


def test_the_conversation_reaches_the_engine_in_order(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="words",
        messages=[
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "roles"},
        ],
    )
    assert answer.choices[0].message.content == "system user assistant user"


def test_the_model_list_names_version_and_digest(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.owned_by) == ("words", "nvila")
    assert card.model_extra == {"version": VERSION, "digest": DIGEST, "root": "words", "parent": None}
    assert client.models.retrieve("words").id == "words"
    with pytest.raises(openai.NotFoundError, match="did you mean"):
        client.models.retrieve("word")


def test_request_id_and_lineage_come_back(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=body("hi"), headers={"x-request-id": "my-id.1"})
    assert answer.headers["x-request-id"] == "my-id.1"
    assert answer.json()["id"] == "chatcmpl-my-id.1"
    assert answer.headers["x-nvila-model-version"] == VERSION
    assert answer.headers["x-nvila-model-digest"] == DIGEST
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "server" not in answer.headers


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b'{"model": ', {}, 400, "invalid_json"),
        (b"[" * 100_000, {}, 400, "invalid_json"),
        (b"\xff\xfe\x00", {}, 400, "invalid_json"),
        (b"", {}, 400, "invalid_json"),
        (b"[]", {}, 400, "invalid_request"),
        (b"{}", {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (json.dumps(body("hi", n=9)).encode(), {}, 400, "too_many_choices"),
        (json.dumps(body("hi", tools=[{"type": "function"}])).encode(), {}, 400, "unsupported_parameter"),
        (json.dumps(body("hi", max_tokens=100_000)).encode(), {}, 400, "max_tokens_too_large"),
        (json.dumps(body("hi") | {"model": "gpt"}).encode(), {}, 404, "model_not_found"),
        (json.dumps(body("refuse")).encode(), {}, 400, "data"),
        (json.dumps(body("refuse", stream=True)).encode(), {}, 400, "data"),
        (json.dumps(body("crash")).encode(), {}, 500, "internal_error"),
        (b" " * (20 * 2**20 + 1), {}, 413, "body_too_large"),
    ],
    ids=[
        "malformed",
        "deep",
        "not-utf8",
        "empty",
        "list",
        "text-plain",
        "n-9",
        "tools",
        "max-tokens",
        "model",
        "engine-refuses",
        "engine-refuses-stream",
        "engine-crashes",
        "body-size",
    ],
)
def test_every_error_has_the_openai_shape(
    http: httpx.Client, content: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    answer = http.post(CHAT, content=content, headers={"content-type": "application/json", **headers})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["code"] == code
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", CHAT, 405, "method_not_allowed"),
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/openai/v1/completions", 405, "method_not_allowed"),
    ],
)
def test_unknown_routes_have_the_openai_shape_too(
    http: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    answer = http.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_chunked_body_over_the_limit_gets_413(http: httpx.Client) -> None:
    answer = http.post(CHAT, content=(b" " * 2**20 for _ in range(21)), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_remote_images_are_refused(client: openai.OpenAI) -> None:
    part: Any = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}
    with pytest.raises(openai.BadRequestError, match="does not fetch remote images") as caught:
        client.chat.completions.create(model="words", messages=[{"role": "user", "content": [part]}])
    assert caught.value.param == "messages[0].content[0].image_url.url"


def test_a_failure_in_mid_stream_is_an_event_without_done(http: httpx.Client, client: openai.OpenAI) -> None:
    answer = http.post(CHAT, json=body("crash later", stream=True))
    assert answer.status_code == 200
    events = answer.text.strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "[DONE]" not in answer.text
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(**body("crash later"), stream=True))


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_stops_its_answer(server: RunningServer, http: httpx.Client, stream: bool) -> None:
    aborted = 'nvila:request_success_total{finished_reason="abort"'
    before = metric(http, aborted)
    content = json.dumps(body("slow 3000", stream=stream, max_tokens=4000)).encode()
    host, port = server.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = ["POST " + CHAT + " HTTP/1.1", "host: x", "content-type: application/json"]
        head += [f"content-length: {len(content)}", "", ""]
        connection.sendall("\r\n".join(head).encode() + content)
        until(lambda: metric(http, "nvila:num_requests_running") == 1)
    until(lambda: metric(http, "nvila:num_requests_running") == 0)
    assert metric(http, aborted) == before + 1


def test_a_full_queue_answers_429_and_recovers(http: httpx.Client, client: openai.OpenAI) -> None:
    threads = [
        threading.Thread(target=http.post, args=(CHAT,), kwargs={"json": body("slow 12")}) for _ in range(CAPACITY)
    ]
    for thread in threads:
        thread.start()
    until(lambda: metric(http, "nvila:num_requests_waiting") == CAPACITY - 1)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(**body("hi"))
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.code == "queue_full"
    for thread in threads:
        thread.join()
    assert client.chat.completions.create(**body("hi")).choices[0].message.content == "hi"


def test_metrics_are_prometheus_text_with_the_models_numbers(http: httpx.Client, png_url: str) -> None:
    names = ("prompt_tokens_total", "generation_tokens_total", "visual_tokens_total")
    before = {name: metric(http, f"nvila:{name}") for name in names}
    part = {"type": "image_url", "image_url": {"url": png_url}}
    message = {"role": "user", "content": [part, {"type": "text", "text": "a b c"}]}
    http.post(CHAT, json={"model": "words", "messages": [message]}).raise_for_status()
    http.post(CHAT, json=body("hi", tools=[{}]))
    text = http.get("/metrics").text
    assert {name: metric(http, f"nvila:{name}") - before[name] for name in names} == {
        "prompt_tokens_total": 19,
        "generation_tokens_total": 4,
        "visual_tokens_total": 16,
    }
    assert f'nvila:model_info{{digest="{DIGEST}",model_name="words",version="{VERSION}"}} 1.0' in text
    assert 'nvila:request_success_total{finished_reason="stop",model_name="words"}' in text
    assert 'nvila:request_rejected_total{model_name="words",reason="unsupported_parameter"}' in text
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert f'nvila:{name}_bucket{{le="0.1",model_name="words"}}' in text


def test_metrics_keep_their_names_whatever_format_prometheus_prefers(http: httpx.Client) -> None:
    prefers = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    answer = http.get("/metrics", headers={"Accept": prefers})
    assert answer.headers["content-type"].startswith("text/plain")
    assert "\nnvila:num_requests_running{" in answer.text
