"""The layers around the application: body limit, ids and headers, disconnects, failures that nobody handled."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.requests import Request

from nvila_platform.serving.errors import REQUEST_ID
from nvila_platform.serving.guard import Guard
from nvila_platform.serving.identity import ModelIdentity
from nvila_platform.serving.limits import AsgiApp, BodyLimit, Event, Limits, Receive, Scope, Send

LIMITS = Limits(max_body_bytes=10)
IDENTITY = ModelIdentity(name="m", version="3", digest="sha256:ab")


class Response:
    """What an application sent."""

    def __init__(self, events: list[Event]) -> None:
        self.status = events[0]["status"] if events else 0
        self.headers = {name.decode(): value.decode() for name, value in events[0]["headers"]} if events else {}
        self.body = b"".join(event.get("body", b"") for event in events[1:])


def call(
    app: AsgiApp, chunks: Sequence[bytes] = (b"",), headers: dict[str, str] | None = None, stay: bool = True
) -> Response:
    async def run() -> Response:
        sent: list[Event] = []
        left = [
            {"type": "http.request", "body": chunk, "more_body": index + 1 < len(chunks)}
            for index, chunk in enumerate(chunks)
        ]

        async def receive() -> Event:
            if left:
                return left.pop(0)
            if stay:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(event: Event) -> None:
            sent.append(event)

        raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = {"type": "http", "method": "POST", "path": "/x", "raw_path": b"/x%0Ay", "headers": raw}
        async with asyncio.timeout(5.0):
            await app(scope, receive, send)
        return Response(sent)

    return asyncio.run(run())


async def read_all(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        event = await receive()
        body, more = body + event.get("body", b""), event.get("more_body", False)
    return body


async def reply(send: Send, body: bytes, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"cache-control", b"public")]})
    await send({"type": "http.response.body", "body": body})


async def echo(_scope: Scope, receive: Receive, send: Send) -> None:
    await reply(send, await read_all(receive))


async def swallows(_scope: Scope, receive: Receive, send: Send) -> None:
    """Answers any failure itself, as web frameworks do."""
    try:
        await read_all(receive)
    except Exception:
        await reply(send, b"there was an error parsing the body", 400)


@pytest.mark.parametrize("app", [echo, swallows])
@pytest.mark.parametrize(
    ("chunks", "headers"),
    [([b"x" * 11], {"content-length": "11"}), ([b"x" * 6] * 2, {}), ([b"x" * 6] * 2, {"content-length": "junk"})],
    ids=["announced", "chunked", "unreadable-length"],
)
def test_a_body_over_the_limit_gets_413(app: AsgiApp, chunks: list[bytes], headers: dict[str, str]) -> None:
    reasons: list[str] = []
    response = call(BodyLimit(app, LIMITS, reasons.append), chunks, headers)
    assert response.status == 413
    assert json.loads(response.body)["error"]["code"] == "body_too_large"
    assert response.headers["connection"] == "close"
    assert reasons == ["body_too_large"]


@pytest.mark.parametrize("app", [echo, swallows])
def test_a_body_that_does_not_arrive_gets_408(app: AsgiApp) -> None:
    async def run() -> list[Event]:
        sent: list[Event] = []

        async def receive() -> Event:
            await asyncio.Event().wait()
            raise AssertionError

        async def send(event: Event) -> None:
            sent.append(event)

        limits = Limits(body_timeout_s=0.05)
        scope: dict[str, Any] = {"type": "http", "path": "/x", "headers": []}
        await BodyLimit(app, limits, lambda _: None)(scope, receive, send)
        return sent

    start, body = asyncio.run(run())
    assert start["status"] == 408
    assert json.loads(body["body"])["error"]["code"] == "body_timeout"


def test_bodies_that_arrive_at_once_are_bounded_together() -> None:
    codes: list[str] = []
    app = BodyLimit(echo, Limits(max_body_bytes=10, max_arriving_bytes=12), codes.append)

    async def ask(pause: asyncio.Event | None, begun: asyncio.Event) -> list[Event]:
        parts: list[Event] = [
            {"type": "http.request", "body": b"x" * 8, "more_body": True},
            {"type": "http.request", "body": b"x", "more_body": False},
        ]
        sent: list[Event] = []

        async def receive() -> Event:
            if len(parts) == 1:
                begun.set()
                if pause is not None:
                    await pause.wait()
            return parts.pop(0)

        async def send(event: Event) -> None:
            sent.append(event)

        await app({"type": "http", "path": "/x", "headers": []}, receive, send)
        return sent

    async def check() -> None:
        pause, begun = asyncio.Event(), asyncio.Event()
        slow = asyncio.ensure_future(ask(pause, begun))
        await begun.wait()
        refused = await ask(None, asyncio.Event())
        assert refused[0]["status"] == 429
        assert b"retry-after" in dict(refused[0]["headers"])
        pause.set()
        assert (await slow)[1]["body"] == b"x" * 9
        # What has arrived, or was refused, makes room.
        assert (await ask(None, asyncio.Event()))[1]["body"] == b"x" * 9

    asyncio.run(check())
    assert codes == ["bodies_full"]


def test_a_client_that_does_not_read_has_left() -> None:
    held: list[str] = []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        held.append("place")
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"much", "more_body": True})
        finally:
            held.clear()

    async def check() -> None:
        async def receive() -> Event:
            await asyncio.Event().wait()
            raise AssertionError

        async def send(event: Event) -> None:
            if event["type"] == "http.response.body":
                await asyncio.Event().wait()

        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/x", "headers": []}
        guard = Guard(app, lambda: ModelIdentity(name="m"), lambda _: None, stall_timeout_s=0.05)
        await asyncio.wait_for(guard(scope, receive, send), 10)

    asyncio.run(check())
    assert held == []


def test_the_time_for_the_body_does_not_bound_the_answer() -> None:
    async def slow(_scope: Scope, receive: Receive, send: Send) -> None:
        await read_all(receive)
        waiting = asyncio.ensure_future(receive())
        await asyncio.sleep(0.1)
        assert not waiting.done()
        waiting.cancel()
        await reply(send, b"late")

    assert call(BodyLimit(slow, Limits(body_timeout_s=0.05), lambda _: None), [b"x"]).body == b"late"


def test_an_announced_body_over_the_limit_is_not_read() -> None:
    async def never(_scope: Scope, _receive: Receive, _send: Send) -> None:
        pytest.fail("called")

    assert call(BodyLimit(never, LIMITS, lambda _: None), [b""], {"content-length": "11"}).status == 413


def test_a_body_at_the_limit_passes() -> None:
    assert call(BodyLimit(echo, LIMITS, lambda _: None), [b"x" * 5, b"y" * 5]).body == b"xxxxxyyyyy"


def test_failures_below_the_limit_stay_failures() -> None:
    async def fails(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ValueError("below")

    with pytest.raises(ValueError, match="below"):
        call(BodyLimit(fails, LIMITS, lambda _: None))


def test_responses_carry_lineage_security_headers_and_the_request_id() -> None:
    headers = call(Guard(echo, lambda: IDENTITY, lambda _: None), headers={"x-request-id": "abc-1"}).headers
    assert headers["x-request-id"] == "abc-1"
    assert headers["x-nvila-model-version"] == "3"
    assert headers["x-nvila-model-digest"] == "sha256:ab"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "sent", ["", "a b", "x" * 129, "evil\tid", "\u00e9"], ids=["none", "space", "long", "tab", "accent"]
)
def test_unusable_request_ids_are_replaced(sent: str) -> None:
    seen: list[str] = []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        seen.append(REQUEST_ID.get())
        await reply(send, b"")

    got = call(Guard(app, lambda: IDENTITY, lambda _: None), headers={"x-request-id": sent} if sent else {})
    assert got.headers["x-request-id"] == seen[0] != sent
    assert len(seen[0]) == 32


def test_unhandled_failures_become_a_500_without_details(caplog: pytest.LogCaptureFixture) -> None:
    async def fails(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise RuntimeError("secret")

    reasons: list[str] = []
    response = call(Guard(fails, lambda: IDENTITY, reasons.append))
    assert response.status == 500
    assert b"secret" not in response.body
    assert "secret" in caplog.text
    assert reasons == ["internal_error"]


def test_a_handler_whose_client_left_is_cancelled() -> None:
    outcome: list[str] = []

    async def waits(_scope: Scope, receive: Receive, _send: Send) -> None:
        await read_all(receive)
        try:
            await asyncio.Event().wait()
        finally:
            outcome.append("cleaned up")

    assert call(Guard(waits, lambda: IDENTITY, lambda _: None), stay=False).status == 0
    assert outcome == ["cleaned up"]


def test_a_client_that_leaves_while_it_sends_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    rejected: list[str] = []

    async def reads(scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, await Request(scope, receive).body())

    caplog.set_level(logging.INFO)
    assert call(Guard(reads, lambda: IDENTITY, rejected.append), chunks=(), stay=False).status == 0
    assert rejected == []
    assert [record.levelname for record in caplog.records] == ["INFO"]  # the line of the access log


def test_a_finished_response_is_not_cancelled_by_the_disconnect() -> None:
    outcome: list[str] = []

    async def lingers(_scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, await read_all(receive))
        assert (await receive())["type"] == "http.disconnect"
        await asyncio.sleep(0.02)
        outcome.append("done")

    assert call(Guard(lingers, lambda: IDENTITY, lambda _: None), stay=False).status == 200
    assert outcome == ["done"]


def test_cancelling_the_server_side_reaches_the_handler() -> None:
    async def check() -> None:
        async def waits(_scope: Scope, _receive: Receive, _send: Send) -> None:
            await asyncio.Event().wait()

        scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/", "raw_path": b"/", "headers": []}
        task = asyncio.ensure_future(Guard(waits, lambda: IDENTITY, lambda _: None)(scope, asyncio.Event().wait, print))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(check())


def test_the_access_log_is_one_line_with_the_encoded_path(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    call(Guard(echo, lambda: IDENTITY, lambda _: None), headers={"x-request-id": "abc"})
    (record,) = caplog.records
    assert record.getMessage().startswith("POST /x%0Ay 200 ")
    assert record.request_id == "abc"  # type: ignore[attr-defined]
