"""Requests that nobody thought of: from the server's own OpenAPI document, and bytes of every kind as media."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.core.result import Ok

from nvila_platform.serving import RunningServer
from nvila_platform.serving.decoder_pool import DecoderPool
from nvila_platform.serving.errors import ApiError
from nvila_platform.serving.limits import Limits
from nvila_platform.serving.media import MediaIntake, MediaSource

FEW, MANY = 8, 400
QUICK = pytest.param(FEW, id="quick")
LONG = pytest.param(MANY, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


def examples(count: int) -> settings:
    """The same examples every time, so that a run says what the last one said."""
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


def check_answer(answer: Any, path: str) -> None:
    """Whatever was sent: a status that is meant, and a body of the protocol that it was sent to."""
    assert answer.status_code < 500 or answer.status_code == 501, (path, answer.status_code, answer.text[:300])
    if answer.status_code < 400:
        return
    body = json.loads(answer.text)
    if path.startswith(("/v1/", "/v2/")):
        assert isinstance(body["error"], str)
        return
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert len(body["error"]["message"]) < 2000
    assert "Traceback" not in answer.text


@pytest.fixture(scope="module")
def document(server: RunningServer) -> Iterator[Any]:
    with httpx.Client(trust_env=False, timeout=20.0) as http:
        yield http.get(f"{server.base_url}/openapi.json").json()


def test_the_document_describes_the_bodies(document: Any) -> None:
    for path, name in (("/openai/v1/chat/completions", "ChatRequest"), ("/openai/v1/completions", "CompletionRequest")):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{name}"}
        assert "model" in document["components"]["schemas"][name]["properties"]
    assert "ImagePart" in document["components"]["schemas"]
    missing = [ref for ref in references(document) if ref not in document["components"]["schemas"]]
    assert not missing


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"].rpartition("/")[2]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


@pytest.mark.parametrize("count", [QUICK, LONG])
def test_whatever_the_document_allows_is_answered_in_the_protocols_words(
    document: Any, http: httpx.Client, count: int
) -> None:
    asked = 0
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()
        if operation.path in ("/metrics", "/playground"):
            continue

        @examples(count)
        @given(case=operation.as_strategy())
        def run(case: Any) -> None:
            nonlocal asked
            asked += 1
            sent = case.as_transport_kwargs(base_url=str(http.base_url))
            sent = {name: value for name, value in sent.items() if name in ("method", "url", "params", "json", "data")}
            path = httpx.URL(sent["url"]).path
            check_answer(http.request(**sent), path)

        run()
    assert asked > count
    good = {"model": "words", "messages": [{"role": "user", "content": "still here"}]}
    answer = http.post("/openai/v1/chat/completions", json=good)
    assert answer.json()["choices"][0]["message"]["content"] == "still here"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
MUTATED = st.dictionaries(
    st.sampled_from(
        ["model", "messages", "n", "stop", "seed", "stream", "temperature", "response_format", "max_tokens"]
    ),
    JSON,
    max_size=4,
)


@pytest.mark.parametrize("count", [pytest.param(40, id="quick"), LONG])
def test_any_value_in_any_field_is_refused_or_answered(http: httpx.Client, count: int) -> None:
    base = {"model": "words", "messages": [{"role": "user", "content": "hi"}]}

    @examples(count)
    @given(changes=MUTATED)
    def run(changes: dict[str, Any]) -> None:
        sent = json.dumps({**base, **changes})
        answer = http.post(
            "/openai/v1/chat/completions", content=sent.encode(), headers={"content-type": "application/json"}
        )
        if "text/event-stream" not in answer.headers["content-type"]:
            check_answer(answer, "/openai/v1/chat/completions")

    run()


def _encoded(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (24, 16), (200, 30, 40)).save(out, kind)
    return out.getvalue()


WHOLE = [_encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A picture with some bytes changed, cut off or doubled; now and then bytes that were never a picture."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(0, 6))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(1, len(data)))] if draw(st.booleans()) else data)


URLS = st.one_of(
    damaged().map(lambda data: f"data:image/png;base64,{base64.b64encode(data).decode()}"),
    st.text(max_size=60),
    st.builds(
        lambda kind, rest: f"data:{kind}{rest}", st.sampled_from(["image/", "video/", ";", ""]), st.text(max_size=40)
    ),
    st.builds(
        lambda scheme, rest: f"{scheme}{rest}",
        st.sampled_from(["https://", "store:", "file://", "http:"]),
        st.text(max_size=30),
    ),
)


@pytest.mark.parametrize("count", [pytest.param(60, id="quick"), LONG])
def test_any_medium_is_a_small_picture_or_an_error_of_the_caller(count: int) -> None:
    limits = Limits(max_image_pixels=100_000, decode_timeout_s=10.0)
    pool = DecoderPool(limits)
    pool.warm_up()
    errors: list[ApiError] = []
    runner = asyncio.Runner()

    @examples(count)
    @given(url=URLS, kind=st.sampled_from(["image", "video"]))
    def run(url: str, kind: Any) -> None:
        source = MediaSource(kind=kind, urls=(url,), param="it", num_frames=2)
        intake = MediaIntake(limits, pool)
        try:
            (medium,) = runner.run(intake.load([source])).media
        except ApiError as e:
            errors.append(e)
        else:
            assert isinstance(medium, Image.Image)
            assert medium.width * medium.height <= limits.max_image_pixels

    try:
        run()
        good = f"data:image/png;base64,{base64.b64encode(WHOLE[0]).decode()}"
        source = MediaSource(kind="image", urls=(good,), param="it")
        (medium,) = runner.run(MediaIntake(limits, pool).load([source])).media
        assert isinstance(medium, Image.Image)
        assert medium.size == (24, 16)
    finally:
        runner.close()
        pool.close()
    assert count // 4 < len(errors) < count, "some are pictures, most are not"
    for error in errors:
        assert error.status in (400, 413), error.message
        assert error.param == "it"
        assert len(error.message) < 500
