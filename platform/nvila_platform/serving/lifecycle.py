"""How the server says what state it is in, and how it ends: first not ready, then closed, then gone."""

from __future__ import annotations

import asyncio
import logging
from types import FrameType
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from nvila_platform.serving.service import ChatService
from nvila_platform.serving.updates import Updater

logger = logging.getLogger(__name__)


class Drain:
    """Puts time between the stop signal and the closing of the port.

    A load balancer hears of the signal later than the process. For `drain_s` the server is not ready but answers
    whoever still comes; then the port closes, and running answers are finished as before. A second signal closes it at
    once.

    Args:
        server: uvicorn's server.
        service: The served model.
        drain_s: Seconds.
    """

    def __init__(self, server: Any, service: ChatService, drain_s: float) -> None:
        self._close = server.handle_exit
        self._service = service
        self._drain_s = drain_s
        self._loop: asyncio.AbstractEventLoop | None = None
        # uvicorn installs this attribute as the handler of SIGTERM and SIGINT.
        server.handle_exit = self.on_signal

    def begin(self) -> None:
        """Note the loop that runs the server."""
        self._loop = asyncio.get_running_loop()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle a stop signal; runs in the main thread, between two instructions of the loop."""
        first = not self._service.queue.draining
        self._service.queue.draining = True
        if first and self._drain_s and self._loop is not None:
            logger.info("not ready any more; the port closes in %g s", self._drain_s)
            self._loop.call_soon_threadsafe(self._loop.call_later, self._drain_s, self._close, number, frame)
        else:
            self._close(number, frame)


def health_router(service: ChatService, updater: Updater | None = None) -> APIRouter:
    """Return the route that tells people and programs what state the server and its updates are in."""
    router = APIRouter()

    async def health() -> Response:
        state, identity = service.queue.state, service.identity
        body: dict[str, Any] = {
            "state": state,
            "model": identity.name,
            "version": identity.version,
            "digest": identity.digest,
        }
        if updater is not None:
            body["update"] = updater.status()
        return JSONResponse(body, 200 if state == "ready" else 503)

    router.add_api_route("/health", health, methods=["GET"], response_model=None)
    return router
