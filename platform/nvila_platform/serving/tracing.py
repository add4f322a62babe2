"""OpenTelemetry traces of requests: request, media, queue, prefill, decode. What was said is in none of them.

The phases are known when they are over, so their spans are made then, with the times that the metrics get.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nvila.errors import CapabilityError, ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

    from nvila.inference.engine import Usage
    from nvila_platform.serving.identity import ModelIdentity
    from nvila_platform.serving.limits import Scope
    from nvila_platform.serving.schema import GenerationRequest

_PROVIDER = "nvila"
_FLUSH_MS = 3000
_EXPORT_TIMEOUT_S = 5.0
_TRACED = ("/completions", ":predict", "/infer")
_NS = 1_000_000_000


class Tracing:
    """Makes the spans of requests and sends them to a collector, in a thread of the SDK's.

    Args:
        provider: Made by `open_tracing`.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("nvila_platform.serving")

    def begin(self, scope: Scope) -> RequestTrace | None:
        """Begin the span of a request; None for one that asks the model nothing."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        if scope["method"] != "POST" or not scope["path"].endswith(_TRACED):
            return None
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        span = self._tracer.start_span(
            f"POST {scope['path']}",
            context=extract(headers),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": "POST", "url.path": scope["path"], "gen_ai.provider.name": _PROVIDER},
        )
        return RequestTrace(self._tracer, span)

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        self._provider.force_flush(_FLUSH_MS)
        self._provider.shutdown()


class RequestTrace:
    """The spans of one request; any thread may add to it.

    Args:
        tracer: Makes spans.
        span: Of the request.
    """

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._lock = threading.Lock()
        self._tokens = {"input": 0, "output": 0}
        self._reasons: list[str] = []
        self._error = ""

    def asked(self, identity: ModelIdentity, request: GenerationRequest, operation: str) -> None:
        """Note which model is asked, and how."""
        given: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.request.model": request.model,
            "gen_ai.request.max_tokens": request.token_limit,
            "gen_ai.request.temperature": request.temperature,
            "gen_ai.request.top_p": request.top_p,
            "gen_ai.request.seed": request.seed,
            "gen_ai.request.choice.count": request.n if request.n > 1 else None,
            "gen_ai.response.model": identity.name,
            "nvila.model.version": identity.version,
            "nvila.model.digest": identity.digest,
        }
        self._span.update_name(f"{operation} {identity.name}")
        self._set({name: value for name, value in given.items() if value is not None})

    def phase(self, name: str, began: float, ended: float, **attributes: int | str) -> None:
        """Add a phase that is over.

        Args:
            name: Of the phase.
            began: On the monotonic clock.
            ended: On the same.
            **attributes: Of its span, with `_` for a dot.
        """
        from opentelemetry.trace import set_span_in_context

        offset = time.time_ns() - round(time.monotonic() * _NS)
        span = self._tracer.start_span(
            name,
            context=set_span_in_context(self._span),
            start_time=offset + round(began * _NS),
            attributes={f"nvila.{key.replace('_', '.', 1)}": value for key, value in attributes.items()},
        )
        span.end(offset + round(ended * _NS))

    def answered(self, reason: str, usage: Usage) -> None:
        """Note the end of an answer; several add up, of which the prompt counts once."""
        with self._lock:
            self._reasons.append(reason)
            self._tokens["input"] = max(self._tokens["input"], usage.prompt_tokens)
            self._tokens["output"] += usage.completion_tokens
            self._set({f"gen_ai.usage.{kind}_tokens": count for kind, count in self._tokens.items()})
            self._set({"gen_ai.response.finish_reasons": tuple(self._reasons)})

    def failed(self, code: str) -> None:
        """Note the code of the error that the request is answered with."""
        self._error = code
        self._set({"error.type": code})

    def end(self, request_id: str, status: int, *, abandoned: bool) -> None:
        """End the span of the request.

        Args:
            request_id: As in the log.
            status: Of the response; 0 when none was begun.
            abandoned: Whether the client left before the response was complete.
        """
        from opentelemetry.trace import Status, StatusCode

        self._set({"nvila.request.id": request_id, "nvila.client.left": abandoned})
        if status:
            self._set({"http.response.status_code": status})
        # What the caller did wrong (4xx) is no failure of ours; an error after the status line has left is.
        if status >= 500 or (self._error and status < 400):
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()

    def _set(self, attributes: Mapping[str, Any]) -> None:
        # A client that has left has ended the span before the engine has noticed.
        if self._span.is_recording():
            self._span.set_attributes(attributes)


TRACE: ContextVar[RequestTrace | None] = ContextVar("trace", default=None)


def check_endpoint(endpoint: str) -> None:
    """Check the address of a collector.

    Raises:
        ConfigError: It is none.
    """
    parts = urlsplit(endpoint)
    if endpoint and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise ConfigError(f"--otlp-endpoint {endpoint!r} is no address", "use http://HOST:4318")


def open_tracing(endpoint: str, name: str) -> Tracing:
    """Send traces to a collector by OTLP over HTTP; the SDK's own variables (`OTEL_*`) hold for the rest.

    Args:
        endpoint: Address of the collector, without the path of traces.
        name: Name of the served model.

    Raises:
        CapabilityError: The SDK or its exporter is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as e:
        raise CapabilityError(f"--otlp-endpoint needs {e.name}", "pip install 'nvila[otel]'") from e
    # A collector that is away is told by the SDK at every batch; that is no news about this server.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=_EXPORT_TIMEOUT_S)
    provider = TracerProvider(resource=Resource.create({"service.name": "nvila-serve", "nvila.model.name": name}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)
