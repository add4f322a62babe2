"""A proxy that stands between a client and a service and can slow down, break off or answer for it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

_BLOCK = 65_536
_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"


class FaultyProxy:
    """Passes bytes on to a service on loopback; tests tell it what to do wrong.

    Args:
        upstream: `host:port` of the service; may be changed when it comes back elsewhere.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.sent = 0  # by clients
        self.received = 0
        self.bytes_per_second: float | None = None
        self._answer: bytes | None = None
        self._pairs: list[socket.socket] = []
        self._lock = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def answer(self, status: int, code: str) -> None:
        """Break off what goes on and answer every request with an S3 error from now on."""
        body = _ERROR.format(code=code)
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        self._answer = f"{head}Connection: close\r\n\r\n{body}".encode()
        self._break_off()

    def pass_on(self) -> None:
        """Pass everything on again."""
        self._answer = None

    def close(self) -> None:
        """Stop."""
        self._server.close()
        self._break_off()

    def _break_off(self) -> None:
        with self._lock:
            for end in self._pairs:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            self._pairs.clear()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if (answer := self._answer) is not None:
                _refuse(client, answer)
                return
            host, _, port = self.upstream.partition(":")
            with socket.create_connection((host, int(port)), 2) as service:
                service.settimeout(None)
                with self._lock:
                    self._pairs += [client, service]
                back = threading.Thread(target=self._pump, args=(service, client, "received"), daemon=True)
                back.start()
                self._pump(client, service, "sent")
                back.join()

    def _pump(self, source: socket.socket, target: socket.socket, count: str) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(_BLOCK):
                target.sendall(block)
                with self._lock:
                    setattr(self, count, getattr(self, count) + len(block))
                if self.bytes_per_second is not None:
                    time.sleep(len(block) / self.bytes_per_second)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _refuse(client: socket.socket, answer: bytes) -> None:
    client.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        while client.recv(_BLOCK):
            pass
    client.sendall(answer)


@pytest.fixture
def faulty() -> Iterator[Callable[[str], FaultyProxy]]:
    """Make a proxy in front of an address."""
    with ExitStack() as stack:

        def make(upstream: str) -> FaultyProxy:
            proxy = FaultyProxy(upstream)
            stack.callback(proxy.close)
            return proxy

        yield make
