"""Asking an OpenAI endpoint: what is sent, what is sent again, what fails, and what stops everything."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nvila.errors import ConfigError, InfrastructureError
from nvila.evaluation.asking import Piece, Question
from nvila.evaluation.fixtures import clip, picture
from nvila.evaluation.task import GenerationSettings
from nvila_platform.endpoint import EndpointAnswerer, find_endpoint

SETTINGS = GenerationSettings(max_new_tokens=5, num_frames=3)


class Service:
    """A real HTTP server that answers by a script: a status, or a text, for every request about a question."""

    def __init__(self, prefix: str = "/v1") -> None:
        self.script: dict[str, list[Any]] = {}
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.cards: list[dict[str, Any]] = [{"id": "m", "object": "model", "created": 0, "owned_by": "x"}]
        self.digest = ""
        service = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                found = self.path == f"{prefix}/models"
                self._reply(200 if found else 404, {"object": "list", "data": service.cards})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.bodies.append(body)
                service.keys.append(self.headers["Authorization"])
                question = body["messages"][0]["content"][-1].get("text", "")
                planned = service.script.get(question) or ["fine"]
                step = planned.pop(0) if len(planned) > 1 else planned[0]
                if isinstance(step, int):
                    self._reply(step, {"error": {"message": f"no {step}"}})
                else:
                    message = {"role": "assistant", "content": step}
                    choice = {"index": 0, "finish_reason": "stop", "message": message}
                    self._reply(
                        200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                    )

            def _reply(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if status == 429:
                    self.send_header("Retry-After", "7")
                if service.digest:
                    self.send_header("x-nvila-model-digest", service.digest)
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.close()


def question(text: str, *media: Piece) -> Question:
    pieces = (*media, Piece("text", text))
    return Question(index=0, id=text, pieces=pieces, reference={"answer": "x"}, group=None, digest=text)


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def answerer(service: Service, waits: list[float]) -> Callable[..., EndpointAnswerer]:
    def make(**options: Any) -> EndpointAnswerer:
        found = find_endpoint(service.url, None)
        given: dict[str, Any] = {"retries": 2, "pause": waits.append}
        return EndpointAnswerer(found, **given | options)

    return make


def test_answers_come_in_order(service: Service, answerer: Callable[..., EndpointAnswerer]) -> None:
    service.script = {str(n): [f" answer {n} "] for n in range(20)}
    found = answerer(concurrency=5).answer([question(str(n)) for n in range(20)], SETTINGS)
    assert [answer.text for answer in found] == [f"answer {n}" for n in range(20)]
    body = service.bodies[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 5, 0.0)


def test_pictures_travel_as_they_are_and_videos_as_frames(
    service: Service, answerer: Callable[..., EndpointAnswerer]
) -> None:
    media = (Piece("image", picture("x")), Piece("video", clip(["red", "blue"])))
    answerer().answer([question("what?", *media)], SETTINGS)
    [content] = [message["content"] for message in service.bodies[0]["messages"]]
    assert [part["type"] for part in content] == ["image_url"] * 4 + ["text"]
    assert all(part["image_url"]["url"].startswith("data:image/png;base64,") for part in content[:-1])


@pytest.mark.parametrize(
    ("script", "text", "problem", "retries"),
    [
        pytest.param([500, "late"], "late", None, 1, id="once"),
        pytest.param([503, 429, "late"], "late", None, 2, id="twice"),
        pytest.param([500], None, "status 500: no 500", 2, id="for-good"),
        pytest.param([400], None, "status 400: no 400", 0, id="the-sample-is-bad"),
        pytest.param([None, "late"], "late", None, 1, id="no-text"),
        pytest.param([""], "", None, 0, id="an-empty-answer-is-an-answer"),
    ],
)
def test_what_passes_is_sent_again(
    service: Service,
    answerer: Callable[..., EndpointAnswerer],
    script: list[Any],
    text: str | None,
    problem: str | None,
    retries: int,
) -> None:
    service.script = {"a": script}
    asking = answerer()
    bad, good = asking.answer([question("a"), question("b")], SETTINGS)
    assert (bad.text, good.text) == (text, "fine")
    assert bad.problem is None if problem is None else (bad.problem or "").startswith(problem)
    assert (asking.traffic.retries, asking.traffic.requests) == (retries, 2 + retries)
    assert sum(asking.traffic.errors.values()) == (problem is not None)


def test_pauses_grow_and_keep_to_what_the_service_asks(
    service: Service, answerer: Callable[..., EndpointAnswerer], waits: list[float]
) -> None:
    service.script = {"a": [500, 500, 500, "x"], "b": [429, "x"]}
    asking = answerer(retries=3)
    asking.answer([question("a")], SETTINGS)
    assert [0.25 * 2**n <= wait <= 0.5 * 2**n for n, wait in enumerate(waits)] == [True] * 3
    waits.clear()
    asking.answer([question("b")], SETTINGS)
    assert waits == [7.0]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_service_that_refuses_us_stops_everything(
    service: Service, answerer: Callable[..., EndpointAnswerer], status: int
) -> None:
    service.script = {"a": [status]}
    with pytest.raises(ConfigError, match=f"answers {status}"):
        answerer().answer([question("a")], SETTINGS)


def test_a_service_that_is_gone_stops_everything(service: Service, answerer: Callable[..., EndpointAnswerer]) -> None:
    asking = answerer()
    service.close()
    with pytest.raises(InfrastructureError, match="any more") as failed:
        asking.answer([question("a"), question("b")], SETTINGS)
    assert failed.value.exit_code == 75


def test_another_model_in_the_middle_stops_everything(
    service: Service, answerer: Callable[..., EndpointAnswerer]
) -> None:
    service.cards[0]["digest"] = service.digest = "a" * 64
    asking = answerer()
    assert asking.endpoint.digest == "a" * 64
    asking.answer([question("a")], SETTINGS)
    service.digest = "b" * 64
    with pytest.raises(InfrastructureError, match="changed its model from aaaaaaaaaaaa to bbbbbbbbbbbb"):
        asking.answer([question("a")], SETTINGS)


def test_no_answer_in_time_is_a_failure_of_the_sample() -> None:
    import socket

    from nvila_platform.endpoint import Endpoint

    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        asking = EndpointAnswerer(Endpoint(url=url, model="m", digest=None), retries=0, timeout_s=0.3)
        [found] = asking.answer([question("a")], SETTINGS)
    assert (found.text, found.problem) == (None, "timeout: no answer in time")


def test_the_key_is_sent(service: Service) -> None:
    found = find_endpoint(service.url, "m", api_key="secret")
    EndpointAnswerer(found, api_key="secret").answer([question("a")], SETTINGS)
    assert service.keys == ["Bearer secret"]


@pytest.mark.parametrize("prefix", ["", "/v1", "/openai/v1"])
def test_the_routes_are_found(prefix: str) -> None:
    made = Service(prefix)
    try:
        assert find_endpoint(made.url + "/", None).url == made.url + prefix
        assert find_endpoint(made.url + prefix, None).url == made.url + prefix
    finally:
        made.close()


def test_services_that_cannot_be_asked(service: Service) -> None:
    with pytest.raises(ConfigError, match="does not serve 'other'"):
        find_endpoint(service.url, "other")
    service.cards.append({**service.cards[0], "id": "n"})
    with pytest.raises(ConfigError, match="serves m, n"):
        find_endpoint(service.url, None)
    assert find_endpoint(service.url, "n").model == "n"
    other = Service("/elsewhere")
    with pytest.raises(ConfigError, match="has no OpenAI routes"):
        find_endpoint(other.url, None)
    other.close()
    with pytest.raises(InfrastructureError, match="nothing answers"):
        find_endpoint(other.url, None)


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_connections_are_closed_when_nobody_asks_any_more(
    service: Service, answerer: Callable[..., EndpointAnswerer], how: str
) -> None:
    asking = answerer()
    asking.answer([question("a")], SETTINGS)
    client = asking._client
    assert not client.is_closed()
    if how == "closed":
        asking.close()
    del asking
    gc.collect()
    assert client.is_closed()
