"""What one request may cost, and the middleware that holds the size of its body to that."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, fields
from typing import Any

from nvila.errors import ConfigError
from nvila_platform.serving.errors import ApiError

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one server; every one of them is checked before the cost it bounds is paid.

    Args:
        max_body_bytes: Whole HTTP body.
        max_image_bytes: One encoded image.
        max_image_pixels: Width times height of one image, read from its header.
        max_images: Images in one request.
        max_instances: Questions in one V1 or V2 request.
        max_requests: Requests admitted at once: the running one and those that wait behind it.
        request_timeout_s: From admission to the last token.
        body_timeout_s: For the client to send its body.
    """

    max_body_bytes: int = 20 * 2**20
    max_image_bytes: int = 10 * 2**20
    max_image_pixels: int = 4096 * 4096
    max_images: int = 8
    max_instances: int = 64
    max_requests: int = 32
    request_timeout_s: float = 120.0
    body_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value <= 0:
                raise ConfigError(
                    f"{field.name} must be positive, got {value}", f"leave out {field.name} for its default"
                )


class _BodyTooLargeError(Exception):
    """Leaves the application from inside `receive`; never seen by a client."""


class BodyLimit:
    """Answers 413 to a body over the limit, whether its length was announced or it arrived in chunks.

    Args:
        app: The wrapped ASGI application.
        max_bytes: Largest accepted body.
        on_reject: Called with the error code, for the reject counter.
    """

    def __init__(self, app: AsgiApp, max_bytes: int, on_reject: Callable[[str], None]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._on_reject = on_reject

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event of the ASGI protocol."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _announced_bytes(scope) > self._max_bytes:
            await self._refuse(scope, send)
            return
        await self._serve_counting(scope, receive, send)

    async def _serve_counting(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0
        exceeded = started = False

        async def counting_receive() -> Event:
            nonlocal received, exceeded
            event = await receive()
            received += len(event.get("body", b""))
            if received > self._max_bytes:
                exceeded = True
                raise _BodyTooLargeError
            return event

        async def guarded_send(event: Event) -> None:
            nonlocal started
            # Frameworks turn any exception of `receive` into an answer of their own; the 413 replaces that answer.
            if exceeded and not started:
                return
            started = True
            await send(event)

        try:
            await self._app(scope, counting_receive, guarded_send)
        except Exception:
            if not exceeded:
                raise
        if exceeded and not started:
            await self._refuse(scope, send)

    async def _refuse(self, scope: Scope, send: Send) -> None:
        error = ApiError(
            413, "body_too_large", f"the request body is over {self._max_bytes} bytes; send fewer or smaller images"
        )
        self._on_reject(error.code)
        # The rest of the body is not read, so the connection cannot carry another request.
        await send_json(send, error.status, error.body_for(scope["path"]), {"connection": "close"})


async def send_json(send: Send, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
    """Send a whole JSON response below the web framework."""
    payload = json.dumps(body).encode()
    fixed = {"content-type": "application/json", "content-length": str(len(payload))}
    raw = [(name.encode(), value.encode()) for name, value in {**fixed, **headers}.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": payload})


def _announced_bytes(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0
