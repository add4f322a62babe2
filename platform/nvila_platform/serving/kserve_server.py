"""The KServe SDK's model server, bound where we say and answering errors in our words.

What is changed against the SDK, and why: it binds 0.0.0.0 whatever it is told; it calls itself ready before any model
is; it lets every client unload the model; and its error handlers send exception texts to clients and a traceback to
the log for each bad request.

Importing this module imports the KServe SDK, which takes seconds: only the server does, when it starts.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from kserve import ModelServer
from kserve import errors as kserve_errors
from kserve.model_server import app
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.server import RESTServer
from starlette.exceptions import HTTPException

from nvila.errors import NvilaError
from nvila_platform.serving.auth import Gatekeeper
from nvila_platform.serving.description import describe_bodies
from nvila_platform.serving.drift import drift_router
from nvila_platform.serving.errors import RETRY_AFTER_S, ApiError, as_api_error
from nvila_platform.serving.express import Express
from nvila_platform.serving.guard import Guard
from nvila_platform.serving.lifecycle import Drain, health_router
from nvila_platform.serving.limits import BodyLimit
from nvila_platform.serving.model import NvilaModel
from nvila_platform.serving.openai_router import build_endpoints, build_router
from nvila_platform.serving.options import ServerOptions
from nvila_platform.serving.playground import playground_router
from nvila_platform.serving.scrape import scrape_router
from nvila_platform.serving.service import ChatService
from nvila_platform.serving.updates import Updater

_SDK_ERRORS: tuple[tuple[type[Exception], int, str], ...] = (
    (kserve_errors.InvalidInput, 400, "invalid_request"),
    (kserve_errors.ModelNotFound, 404, "model_not_found"),
    (kserve_errors.ModelNotReady, 503, "model_not_ready"),
    (kserve_errors.ServerNotReady, 503, "model_not_ready"),
    (kserve_errors.UnsupportedProtocol, 501, "not_implemented"),
    (NotImplementedError, 501, "not_implemented"),
)
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


class NvilaServer(ModelServer):  # type: ignore[misc]  # the KServe SDK ships no types
    """Serves one `ChatService` on one listening socket.

    Args:
        service: The model.
        listener: A bound socket; nothing else is listened to.
        grace_s: How long SIGTERM waits for running answers.
        options: Who may ask, and how the server ends.

    Raises:
        ConfigError: The key file cannot be used.
    """

    def __init__(self, service: ChatService, listener: socket.socket, grace_s: float, options: ServerOptions) -> None:
        super().__init__(
            http_port=listener.getsockname()[1], workers=1, enable_grpc=False, grace_period=max(1, round(grace_s))
        )
        self.service = service
        self.updater: Updater | None = None
        self.dataplane = _DataPlane(self.registered_models, service)
        self.model_repository_extension = _FixedRepository(self.registered_models)
        for identity in service.version:
            self.register_model(NvilaModel(service, identity.name))
        self._rest_server = _RestServer(
            service,
            listener,
            options,
            self.dataplane,
            self.model_repository_extension,
            self.http_port,
            grace_period=self.grace_period,
        )

    def run(self) -> None:
        """Serve until a signal or `shut_down`; running answers are finished first."""
        self.register_signal_handler()
        # uvloop where it is installed: an event costs it half.
        with asyncio.Runner(loop_factory=self._rest_server.config.get_loop_factory()) as runner:
            runner.run(self._rest_server.start(self.updater))

    def shut_down(self) -> None:
        """Stop from another thread, as a signal would."""
        self._rest_server._server.should_exit = True


class _RestServer(RESTServer):  # type: ignore[misc]  # the KServe SDK ships no types
    def __init__(
        self, service: ChatService, listener: socket.socket, options: ServerOptions, *args: Any, **more: Any
    ) -> None:
        super().__init__("kserve.model_server:app", *args, **more)
        self._service = service
        self._listener = listener
        self._options = options
        self._updater: Updater | None = None
        rejected = service.rejected
        # Built here: a key file that cannot be used is known before the model is loaded.
        limited = BodyLimit(Express(app, build_endpoints(service)), service.limits, rejected)
        checked = Gatekeeper(limited, options.access, rejected)
        stall = service.limits.stall_timeout_s
        self.config.app = Guard(checked, lambda: service.identity, rejected, service.tracing, stall_timeout_s=stall)
        self._drain = Drain(self._server, service, options.drain_s)
        self.config.host = listener.getsockname()[0]
        self.config.server_header = False
        self.config.access_log = False

    def _add_middlewares(self, app: FastAPI) -> None:
        # The SDK's timing middleware writes two log lines a request; ours writes one.
        pass

    def _register_endpoints(self, app: FastAPI) -> None:
        # Before the SDK's own of the same path: the first match answers.
        app.include_router(scrape_router())
        super()._register_endpoints(app)
        app.include_router(build_router(self._service))
        app.include_router(health_router(self._service, self._updater))
        if self._service.traffic is not None:
            app.include_router(drift_router(self._service.traffic.watch))
        if self._options.production:
            # Neither a page nor a description of what could be tried.
            app.router.routes = [one for one in app.router.routes if getattr(one, "path", "") != app.openapi_url]
        else:
            describe_bodies(app)
            app.include_router(playground_router(self._service))

    def _add_exception_handlers(self, app: FastAPI) -> None:
        super()._add_exception_handlers(app)
        add_error_handlers(app, self._service)

    async def start(self, updater: Updater | None = None) -> None:
        self._updater = updater
        self.create_application()
        self._drain.begin()
        if updater is not None:
            loop = asyncio.get_running_loop()
            updater.begin(loop)
            loop.add_signal_handler(signal.SIGHUP, updater.ask)
        await self._server.serve(sockets=[self._listener])


class _DataPlane(DataPlane):  # type: ignore[misc]  # the KServe SDK ships no types
    def __init__(self, models: Any, service: ChatService) -> None:
        super().__init__(models)
        self._service = service

    async def live(self) -> dict[str, str]:
        if self._service.queue.broken:
            raise ApiError(503, "broken", "the engine has ended; restart this process")
        return {"status": "alive"}

    async def ready(self) -> bool:
        return self._service.queue.state == "ready"

    def decode(self, body: Any, headers: Any, *args: Any, **options: Any) -> Any:
        try:
            return super().decode(body, headers, *args, **options)
        except kserve_errors.InvalidInput:
            raise
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, kserve_errors.InferenceError) as e:
            # The SDK trusts binary requests to be well-formed, and its tensors of bytes hold only text.
            message = "the request does not follow the V2 protocol; tensors hold text, images travel as data: URIs"
            raise ApiError(400, "invalid_request", message) from e


class _FixedRepository(ModelRepositoryExtension):  # type: ignore[misc]  # the KServe SDK ships no types
    async def load(self, model_name: str) -> None:
        raise self._refusal()

    async def unload(self, model_name: str) -> None:
        raise self._refusal()

    @staticmethod
    def _refusal() -> ApiError:
        return ApiError(403, "fixed_model", "this server serves one model; deploy another server for another model")


def add_error_handlers(app: FastAPI, service: ChatService) -> None:
    """Answer every error of `app` in the shape of the protocol it happened in."""

    def answer(request: Request, error: ApiError) -> Response:
        service.rejected(error.code)
        return JSONResponse(error.body_for(request.url.path), error.status, headers=error.headers)

    async def own(request: Request, error: Exception) -> Response:
        return answer(request, as_api_error(error))

    async def http(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        detail = error.detail if isinstance(error, HTTPException) else ""
        message = f"{request.method} {request.url.path[:200]}: {detail}"
        return answer(request, ApiError(status, _HTTP_CODES.get(status, "http_error"), message))

    async def invalid(request: Request, error: Exception) -> Response:
        problems = error.errors() if isinstance(error, RequestValidationError) else ()
        first = problems[0] if problems else {"loc": (), "msg": "not readable"}
        where = ".".join(str(step) for step in first["loc"] if step != "body")
        return answer(request, ApiError(400, "invalid_request", f"{where}: {first['msg']}".lstrip(": ")))

    app.add_exception_handler(ApiError, own)
    app.add_exception_handler(NvilaError, own)
    app.add_exception_handler(kserve_errors.InferenceError, own)
    app.add_exception_handler(Exception, own)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    for kind, status, code in _SDK_ERRORS:
        app.add_exception_handler(kind, _sdk_handler(answer, status, code))


def _sdk_handler(answer: Any, status: int, code: str) -> Any:
    async def handle(request: Request, error: Exception) -> Response:
        retry_after_s = RETRY_AFTER_S if status == 503 else None
        response: Response = answer(
            request, ApiError(status, code, str(error) or "not implemented", retry_after_s=retry_after_s)
        )
        return response

    return handle
