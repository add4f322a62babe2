"""Answers questions without the web framework's routing, which costs more than all else that a question needs here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import Response

from nvila_platform.serving.limits import AsgiApp, Receive, Scope, Send

# Gets the request and what to hold until its response has left, however that ends.
Endpoint: TypeAlias = Callable[[Request, ExitStack], Awaitable[Response]]


class Express:
    """Takes POSTs to a few paths; everything else goes on to the framework.

    Errors go up to the guard, which answers them as the framework's handlers would.

    Args:
        app: The wrapped ASGI application.
        endpoints: What answers, by path.
    """

    def __init__(self, app: AsgiApp, endpoints: Mapping[str, Endpoint]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event of the ASGI protocol."""
        post = scope["type"] == "http" and scope["method"] == "POST"
        endpoint = self._endpoints.get(scope["path"]) if post else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        with ExitStack() as held:
            response = await endpoint(Request(scope, receive), held)
            await response(scope, receive, send)
