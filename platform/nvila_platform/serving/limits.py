"""What one request may cost, and the middleware that holds the size of its body to that."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, fields
from typing import Any

from nvila.errors import ConfigError
from nvila_platform.serving.errors import RETRY_AFTER_S, ApiError

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
        max_arriving_bytes: Bodies of all requests that are still being received, before they are admitted or refused.
        max_image_bytes: One encoded image.
        max_image_pixels: Width times height of one image or frame, read from its header.
        max_images: Images in one question, frames of frame lists included; V1 and V2 requests hold several questions.
        max_videos: Videos in one question.
        max_video_bytes: One encoded video.
        max_video_seconds: Length of one video, read before its frames are decoded.
        max_frames: Frames sampled from all videos of one request.
        max_frame_side: Longer side that larger frames are scaled down to while they are decoded, in pixels.
        decode_timeout_s: For decoding one image or video.
        decode_memory_bytes: What decoding one image or video may take.
        max_decoded_bytes: Decoded pixels of all requests that wait for the engine.
        decode_workers: Processes that decode, so also images and videos decoded at once.
        fetch_timeout_s: For fetching one image or video, redirects included.
        max_instances: Questions in one V1 or V2 request.
        max_choices: Answers to one request (`n`).
        max_requests: Requests admitted at once: the running ones and those that wait behind them.
        max_cost_tokens: Tokens of all requests admitted at once, as estimated before anything is decoded: text, visual
            tokens, answers.
        max_running: Requests in the engine at once; they share its steps.
        request_timeout_s: From admission to the last token.
        body_timeout_s: For the client to send its body.
        stall_timeout_s: For the client to take a part of its answer.
        keep_alive_s: Quiet time after which a stream sends a comment, so that proxies do not hang up.
    """

    max_body_bytes: int = 20 * 2**20
    max_arriving_bytes: int = 512 * 2**20
    max_image_bytes: int = 10 * 2**20
    max_image_pixels: int = 4096 * 4096
    max_images: int = 16
    max_videos: int = 2
    max_video_bytes: int = 64 * 2**20
    max_video_seconds: float = 3600.0
    max_frames: int = 64
    max_frame_side: int = 1280
    decode_timeout_s: float = 20.0
    decode_memory_bytes: int = 2**30
    max_decoded_bytes: int = 2 * 2**30
    decode_workers: int = 2
    fetch_timeout_s: float = 10.0
    max_instances: int = 64
    max_choices: int = 8
    max_requests: int = 32
    max_cost_tokens: int = 262_144
    max_running: int = 16
    request_timeout_s: float = 120.0
    body_timeout_s: float = 30.0
    stall_timeout_s: float = 30.0
    keep_alive_s: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value <= 0:
                raise ConfigError(
                    f"{field.name} must be positive, got {value}", f"leave out {field.name} for its default"
                )


class _BodyRefusedError(Exception):
    """Leaves the application from inside `receive`; never seen by a client."""


class BodyLimit:
    """Answers 413 to a body over the limit, announced or sent in chunks, and 408 to one that does not arrive.

    Args:
        app: The wrapped ASGI application.
        limits: Largest accepted body and the time to send it.
        on_reject: Called with the error code, for the reject counter.
    """

    def __init__(self, app: AsgiApp, limits: Limits, on_reject: Callable[[str], None]) -> None:
        self._app = app
        self._limits = limits
        self._on_reject = on_reject
        self._arriving = _Arriving(limits.max_arriving_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event of the ASGI protocol."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, self._limits, self._arriving)
        if _announced_bytes(scope) > self._limits.max_body_bytes:
            body.refusal = _too_large(self._limits)
        else:
            await self._serve(scope, body, send)
        if body.refusal is not None and not body.answered:
            self._on_reject(body.refusal.code)
            # The rest of the body is not read, so the connection cannot carry another request.
            headers = {"connection": "close", **body.refusal.headers}
            await send_json(send, body.refusal.status, body.refusal.body_for(scope["path"]), headers)

    async def _serve(self, scope: Scope, body: _Body, send: Send) -> None:
        async def guarded_send(event: Event) -> None:
            # Frameworks turn any exception of `receive` into an answer of their own; the refusal replaces that answer.
            if body.refusal is not None and not body.answered:
                return
            body.answered = True
            await send(event)

        try:
            await self._app(scope, body.receive, guarded_send)
        except Exception:
            if body.refusal is None:
                raise
        finally:
            body.arrived()


class _Arriving:
    """Bytes of all bodies that are being received; only the event loop's thread touches them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0


class _Body:
    """Counts a body while the application reads it."""

    def __init__(self, receive: Receive, limits: Limits, arriving: _Arriving) -> None:
        self._receive = receive
        self._arriving = arriving
        self._held = 0
        self._limits = limits
        self._deadline = asyncio.get_running_loop().time() + limits.body_timeout_s
        self._received = 0
        self._complete = False
        self.refusal: ApiError | None = None
        self.answered = False

    async def receive(self) -> Event:
        if self._complete:
            # What follows a body is the client's leaving, which may take as long as it likes.
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                event = await self._receive()
        except TimeoutError as e:
            message = f"the body did not arrive within {self._limits.body_timeout_s:g} s"
            self.refusal = ApiError(408, "body_timeout", message)
            raise _BodyRefusedError from e
        self._complete = not event.get("more_body", False)
        size = len(event.get("body", b""))
        self._received += size
        if self._received > self._limits.max_body_bytes:
            self.refusal = _too_large(self._limits)
            raise _BodyRefusedError
        if self._complete:
            # What happens next is to admit the request or to refuse it, and admitted ones are counted.
            self.arrived()
        elif self._arriving.held + size > self._arriving.most:
            message = "the bodies of other requests fill the memory set aside for them; try again"
            self.refusal = ApiError(429, "bodies_full", message, retry_after_s=RETRY_AFTER_S)
            raise _BodyRefusedError
        else:
            self._arriving.held += size
            self._held += size
        return event

    def arrived(self) -> None:
        """Count nothing of it any more."""
        self._arriving.held -= self._held
        self._held = 0


def _too_large(limits: Limits) -> ApiError:
    message = f"the request body is over {limits.max_body_bytes} bytes; send fewer or smaller images"
    return ApiError(413, "body_too_large", message)


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
