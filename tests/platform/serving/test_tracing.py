"""Traces of a real server, as a collector on loopback gets them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from nvila.errors import ConfigError
from nvila_platform.serving import RunningServer
from nvila_platform.serving.options import ServerOptions

StartWords = Callable[..., AbstractContextManager[RunningServer]]
TRACE_ID, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Receives spans by OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        self.url = ""

    def take(self, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        for batch in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append(attributes(batch.resource))
            for scope in batch.scope_spans:
                self.spans += scope.spans

    def named(self, name: str, trace_id: str = "") -> list[Any]:
        return [span for span in self.spans if span.name == name and trace_id in span.trace_id.hex()]

    def wait(self, name: str, count: int = 1, trace_id: str = "") -> list[Any]:
        deadline = time.monotonic() + 20.0
        while len(found := self.named(name, trace_id)) < count:
            assert time.monotonic() < deadline, f"no {name} in {[span.name for span in self.spans]}"
            time.sleep(0.05)
        return found


def attributes(of: Any) -> dict[str, Any]:
    values = {}
    for pair in of.attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        values[pair.key] = [one.string_value for one in value.values] if kind == "array_value" else value
    return values


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            import gzip

            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            collector.take(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *unused: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as made:
        yield made


@pytest.fixture(scope="module")
def http(
    tmp_path_factory: pytest.TempPathFactory, start_words: StartWords, collector: Collector
) -> Iterator[httpx.Client]:
    # The server's environment: batches leave at once.
    patch = pytest.MonkeyPatch()
    patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    try:
        with (
            start_words(
                tmp_path_factory.mktemp("model"), version="7", args=("--otlp-endpoint", collector.url)
            ) as server,
            httpx.Client(base_url=server.base_url, trust_env=False, timeout=20.0) as client,
        ):
            yield client
    finally:
        patch.undo()


def chat(http: httpx.Client, content: Any, trace_id: str, **options: Any) -> httpx.Response:
    body = {"model": "words", "messages": [{"role": "user", "content": content}], **options}
    headers = {"traceparent": f"00-{trace_id}-{CALLER}-01", "x-request-id": "mine"}
    return http.post("/openai/v1/chat/completions", json=body, headers=headers)


def test_a_request_has_its_phases_below_it_and_the_callers_trace_above(
    http: httpx.Client, collector: Collector, png_url: str
) -> None:
    content = [{"type": "image_url", "image_url": {"url": png_url}}, {"type": "text", "text": "private words"}]
    answer = chat(http, content, TRACE_ID, max_tokens=9, temperature=0.5, stream=True)
    assert answer.status_code == 200
    (request,) = collector.wait("chat words", trace_id=TRACE_ID)
    assert request.parent_span_id.hex() == CALLER
    assert request.kind == request.SPAN_KIND_SERVER
    found = attributes(request)
    assert (
        found
        | {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "nvila",
            "gen_ai.request.model": "words",
            "gen_ai.response.model": "words",
            "gen_ai.request.max_tokens": 9,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.usage.input_tokens": 18,
            "gen_ai.usage.output_tokens": 3,
            "gen_ai.response.finish_reasons": ["stop"],
            "nvila.model.version": "7",
            "nvila.request.id": "mine",
            "http.response.status_code": 200,
            "http.request.method": "POST",
            "url.path": "/openai/v1/chat/completions",
            "nvila.client.left": False,
        }
        == found
    )
    spans = {name: collector.wait(name, trace_id=TRACE_ID)[0] for name in ("media", "queue", "prefill", "decode")}
    order = list(spans.values())
    for span in order:
        assert span.parent_span_id == request.span_id
        assert request.start_time_unix_nano - 10**7 <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano + 10**7
    starts = [span.start_time_unix_nano for span in order]
    assert starts == sorted(starts)
    assert attributes(spans["decode"]) == {"nvila.finish.reason": "stop", "nvila.output.tokens": 3}
    assert attributes(spans["media"]) == {"nvila.media.count": 1}
    assert collector.resources[0]["service.name"] == "nvila-serve"
    assert "private" not in "".join(str(span) for span in collector.spans)


def test_several_answers_add_up(http: httpx.Client, collector: Collector) -> None:
    trace_id = "5" * 32
    chat(http, "one two", trace_id, n=2, seed=1)
    (request,) = collector.wait("chat words", trace_id=trace_id)
    found = attributes(request)
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (2, 4)
    assert found["gen_ai.request.choice.count"] == 2
    assert len(collector.wait("decode", 2, trace_id)) == 2


def test_failures_are_told_apart(http: httpx.Client, collector: Collector) -> None:
    wrong, ours, late = "6" * 32, "7" * 32, "8" * 32
    assert chat(http, "refuse", wrong).status_code == 400
    assert chat(http, "crash", ours).status_code == 500
    chat(http, "crash later", late, stream=True)
    (refused,) = collector.wait("chat words", trace_id=wrong)
    assert (attributes(refused)["error.type"], refused.status.code) == ("data", refused.status.STATUS_CODE_UNSET)
    (failed,) = collector.wait("chat words", trace_id=ours)
    assert (attributes(failed)["error.type"], failed.status.code) == ("internal_error", failed.status.STATUS_CODE_ERROR)
    (broken,) = collector.wait("chat words", trace_id=late)
    assert attributes(broken)["http.response.status_code"] == 200
    assert broken.status.code == broken.status.STATUS_CODE_ERROR


def test_the_other_protocols_are_traced_and_probes_are_not(http: httpx.Client, collector: Collector) -> None:
    http.get("/health")
    http.post("/openai/v1/completions", json={"model": "words", "prompt": "hi"})
    http.post("/v1/models/words:predict", json={"instances": [{"prompt": "one"}, {"prompt": "two"}]})
    (request,) = collector.wait("text_completion words")
    assert request.parent_span_id == b""
    predicted = collector.wait("decode", 2)
    assert predicted
    assert not [span for span in collector.spans if "/health" in str(span)]


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://collector", "http://"])
def test_an_address_that_is_none(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="--otlp-endpoint"):
        ServerOptions(otlp_endpoint=endpoint)


def test_a_collector_that_is_away_costs_no_answer(
    tmp_path: Path, start_words: StartWords, closed_endpoint: str
) -> None:
    with (
        start_words(tmp_path, args=("--otlp-endpoint", f"http://{closed_endpoint}")) as server,
        httpx.Client(base_url=server.base_url, trust_env=False, timeout=20.0) as client,
    ):
        assert chat(client, "one", TRACE_ID).status_code == 200
        assert client.get("/health").json()["state"] == "ready"
