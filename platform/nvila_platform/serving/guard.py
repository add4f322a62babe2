"""The outermost layer of the server: request ids, lineage and security headers, disconnects, the access log."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from uuid import uuid4

from starlette.requests import ClientDisconnect

from nvila_platform.serving.errors import REQUEST_ID, ApiError, as_api_error
from nvila_platform.serving.identity import ModelIdentity
from nvila_platform.serving.limits import AsgiApp, Event, Receive, Scope, Send, send_json
from nvila_platform.serving.served import LINEAGE, Lineage
from nvila_platform.serving.tracing import TRACE, Tracing

logger = logging.getLogger(__name__)

# A client's id is repeated in headers and logs, so only a harmless alphabet is taken over.
_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
_SHOWN = 500
_MAX_HEADER_BYTES = 32 * 1024
_POLICY = b"content-security-policy"
_QUIET_PATHS = ("/health", "/metrics", "/v2/health/")


class Guard:
    """Wraps the whole application, error handlers of the framework included.

    A handler whose client went away is cancelled, wherever it waits, so that no endpoint has to watch for it.

    Args:
        app: The wrapped ASGI application.
        identity: Names the served model, for the lineage headers of answers that no model of its own has given.
        on_reject: Called with the error code of a failure that no handler answered.
        tracing: Makes the spans of requests; None makes none.
        stall_timeout_s: For a client to take a part of its answer; one that does not has left.
    """

    def __init__(
        self,
        app: AsgiApp,
        identity: Callable[[], ModelIdentity],
        on_reject: Callable[[str], None],
        tracing: Tracing | None = None,
        stall_timeout_s: float = 30.0,
    ) -> None:
        self._tracing = tracing
        self._stall_timeout_s = stall_timeout_s
        self._app = app
        self._identity = identity
        self._on_reject = on_reject

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event of the ASGI protocol."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        REQUEST_ID.set(request_id)
        lineage = Lineage()
        LINEAGE.set(lineage)

        def headers() -> dict[str, str]:
            identity = lineage.identity or self._identity()
            return {**_SECURITY_HEADERS, **identity.headers(), "x-request-id": request_id}

        exchange = _Exchange(receive, send, headers, self._stall_timeout_s)
        started = time.monotonic()
        trace = None if self._tracing is None else self._tracing.begin(scope)
        TRACE.set(trace)
        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > _MAX_HEADER_BYTES:
                raise ApiError(431, "headers_too_large", f"the headers have over {_MAX_HEADER_BYTES} bytes")
            await exchange.run(self._app, scope)
        except ClientDisconnect:
            # It left while it sent its question: nobody is there to answer, and nothing here has failed.
            exchange.leave()
        except Exception as e:
            error = as_api_error(e)
            self._on_reject(error.code)
            if not exchange.status:
                await send_json(exchange.send, error.status, error.body_for(scope["path"]), error.headers)
        finally:
            _log_access(scope, exchange, request_id, time.monotonic() - started)
            if trace is not None:
                trace.end(request_id, exchange.status, abandoned=exchange.abandoned)


class _Exchange:
    """One request and its response, with somebody watching whether the client is still there."""

    def __init__(
        self, receive: Receive, send: Send, headers: Callable[[], dict[str, str]], stall_timeout_s: float
    ) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._receive = receive
        self._send = send
        self._headers = headers
        self._gone = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._handler: asyncio.Task[None] | None = None
        self._finished = False
        self.status = 0

    @property
    def abandoned(self) -> bool:
        """Whether the client left before the response was complete."""
        return self._gone.is_set() and not self._finished

    def leave(self) -> None:
        """Take note that the client has left."""
        self._gone.set()

    async def run(self, app: AsgiApp, scope: Scope) -> None:
        self._handler = asyncio.ensure_future(app(scope, self.receive, self.send))
        try:
            await self._handler
        except asyncio.CancelledError:
            # Ours when the watcher cancelled the handler, not when somebody cancels this request from outside.
            outside = asyncio.current_task()
            if not self.abandoned or (outside is not None and outside.cancelling()):
                raise
        finally:
            if self._watcher is not None:
                self._watcher.cancel()

    async def receive(self) -> Event:
        if self._watcher is not None:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        event = await self._receive()
        if event["type"] == "http.disconnect":
            self._gone.set()
        elif not event.get("more_body", False):
            self._watcher = asyncio.create_task(self._watch())
        return event

    async def send(self, event: Event) -> None:
        if event["type"] == "http.response.start":
            self.status = event["status"]
            sent = event.get("headers", [])
            # Made now: which model answers is known only since the request was read.
            ours = [(name.encode(), value.encode()) for name, value in self._headers().items()]
            names = {name for name, _ in ours}
            # A page of ours says itself what it may load; nothing else of these is anybody else's to say.
            own = {_POLICY for name, _ in sent if name.lower() == _POLICY}
            kept = [(name, value) for name, value in sent if name.lower() not in names - own]
            added = [(name, value) for name, value in ours if name not in own]
            event = {**event, "headers": [*kept, *added]}
        elif not event.get("more_body", False):
            self._finished = True
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await self._send(event)
        except TimeoutError as e:
            # It asks and does not read: the place in the queue is for others.
            self._finished = False
            self._gone.set()
            raise ClientDisconnect from e

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()
        if not self._finished and self._handler is not None:
            self._handler.cancel()


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            sent = value.decode("latin-1")
            if _ACCEPTED_ID.fullmatch(sent):
                return str(sent)
    return uuid4().hex


def _log_access(scope: Scope, exchange: _Exchange, request_id: str, seconds: float) -> None:
    # The raw path is still percent-encoded: a line feed in it cannot start a log line of its own.
    path = scope.get("raw_path", b"").decode("latin-1")
    level = logging.DEBUG if path.startswith(_QUIET_PATHS) else logging.INFO
    outcome = "client went away" if exchange.abandoned else str(exchange.status)
    extra = {"request_id": request_id}
    if "nvila.caller" in scope:
        extra["caller"] = scope["nvila.caller"]
    logger.log(level, "%s %s %s %.0f ms", scope["method"], path[:_SHOWN], outcome, seconds * 1000, extra=extra)
