"""Framing that lies and bodies that dribble in: refused or closed in time, and others are served meanwhile."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import pytest

from nvila_platform.serving import RunningServer

CHAT = "/openai/v1/chat/completions"
BODY_TIMEOUT_S = 30.0


def body(text: str = "hi") -> dict[str, Any]:
    return {"model": "words", "messages": [{"role": "user", "content": text}]}


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


def serves(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=body("still here"))
    assert answer.json()["choices"][0]["message"]["content"] == "still here"


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
