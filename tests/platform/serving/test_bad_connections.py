"""What is no HTTP, framing that lies, bodies that dribble in, clients that leave, floods: others are served."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable

import httpx
import pytest
from tests.bad_requests import CHAT, body, serves

from nvila_platform.serving import RunningServer

BODY_TIMEOUT_S = 30.0


def head(*lines: str) -> bytes:
    return "\r\n".join([f"POST {CHAT} HTTP/1.1", "host: x", "content-type: application/json", *lines, "", ""]).encode()


def connect(server: RunningServer) -> socket.socket:
    host, port = server.base_url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=5.0)


def answers(connection: socket.socket, wait_s: float = 5.0) -> bytes:
    """Return all that comes until the server closes, or says nothing for `wait_s`."""
    connection.settimeout(wait_s)
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except (TimeoutError, ConnectionError):
        pass
    return received


CONTENT = json.dumps(body()).encode()
INNER = b"GET /openai/v1/models HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        head(f"content-length: {len(CONTENT)}", f"content-length: {len(CONTENT) + 9}") + CONTENT,
        head(f"content-length: {len(CONTENT)}", "transfer-encoding: chunked") + b"0\r\n\r\n" + INNER,
        head("transfer-encoding: chunked", "transfer-encoding: identity") + b"0\r\n\r\n" + INNER,
        head("transfer-encoding: chunked") + b"zz\r\n" + CONTENT,
        head("transfer-encoding: chunked") + b"ffffffffffffffffffff\r\n" + CONTENT,
        head("content-length: 99999999999999999999999") + CONTENT,
        head(f"content-length: {len(CONTENT)}", "bad header: x") + CONTENT,
        head(f"content-length: {len(CONTENT)}", "x: a\0b") + CONTENT,
    ],
    ids=["two-lengths", "length-and-chunks", "two-encodings", "no-hex", "chunk-too-long", "huge", "name", "null"],
)
def test_framing_that_lies_is_refused_and_smuggles_nothing(
    server: RunningServer, http: httpx.Client, sent: bytes
) -> None:
    with connect(server) as connection:
        connection.sendall(sent)
        received = answers(connection, 2.0)
    assert b" 200 " not in received
    assert b'"object":"list"' not in received
    assert not received or received.startswith(b"HTTP/1.1 4")
    serves(http)


def test_a_chunked_body_over_the_limit_is_cut_off(server: RunningServer, http: httpx.Client) -> None:
    chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    with connect(server) as connection:
        connection.sendall(head("transfer-encoding: chunked"))
        sent = 0
        try:
            while sent < 64:
                connection.sendall(chunk)
                sent += 1
        except ConnectionError:
            pass
        received = answers(connection)
    assert sent < 64 or received.startswith(b"HTTP/1.1 413")
    serves(http)


@pytest.mark.slow
def test_bodies_that_never_come_are_given_up_while_others_are_served(server: RunningServer, http: httpx.Client) -> None:
    began = time.monotonic()
    with connect(server) as silent, connect(server) as dribbling:
        for connection in (silent, dribbling):
            connection.sendall(head(f"content-length: {len(CONTENT)}") + CONTENT[:5])
        for position in range(5, 25):
            time.sleep(1.0)
            dribbling.sendall(CONTENT[position : position + 1])
            serves(http)
        for connection in (silent, dribbling):
            assert answers(connection, BODY_TIMEOUT_S).startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began < 2 * BODY_TIMEOUT_S
    serves(http)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-length: two\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 200_000 + b"\r\n\r\n",
    ],
    ids=["no-target", "tls", "negative-length", "length-word", "giant-header"],
)
def test_what_is_no_http_is_turned_away(server: RunningServer, http: httpx.Client, sent: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(sent + b"\r\n\r\n")
        answer = answers(connection)
    assert not answer or answer.startswith(b"HTTP/1.1 4")
    serves(http)


@pytest.mark.parametrize("phase", ["connected", "headers", "half-a-body", "body", "answering", "streaming"])
def test_clients_that_leave_at_any_moment(server: RunningServer, http: httpx.Client, phase: str) -> None:
    content = json.dumps(body("slow 100", stream=phase == "streaming", max_tokens=200)).encode()
    first = head(f"content-length: {len(content)}")
    sent = {"connected": b"", "headers": first, "half-a-body": first + content[:20]}.get(phase, first + content)
    with connect(server) as connection:
        connection.sendall(sent)
        if phase == "streaming":
            connection.recv(100)
        elif phase == "answering":
            time.sleep(0.3)
    until(lambda: "nvila:num_requests_running{" not in http.get("/metrics").text or load(http) == 0)
    serves(http)


def test_a_flood_is_shed_and_the_rest_is_answered(server: RunningServer, http: httpx.Client) -> None:
    statuses: list[int] = []

    def ask() -> None:
        answer = httpx.post(server.base_url + CHAT, json=body("slow 2"), trust_env=False, timeout=60.0)
        statuses.append(answer.status_code)
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    serves(http)


def load(http: httpx.Client) -> float:
    names = ("nvila:num_requests_running{", "nvila:num_requests_waiting{", "nvila:visual_load_tokens{")
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(names)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
