"""Processes that start in milliseconds: forks of one that has imported what they need and does nothing else.

A server, and not a fork of the process that asks: that one has threads, and between them no fork is safe. The server
has none of its own. A fork has everything else of a process: memory, environment, signals, a way to end.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self

from nvila.errors import InfrastructureError
from nvila_platform.launch.child import collect_rarely, die_with_parent
from nvila_platform.launch.outcome import killed_error

_LENGTH, _CODE = struct.Struct("!I"), struct.Struct("!i")
_STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a forked process does.

    Args:
        entry: `module:function`; its return value is dropped, what it raises ends the process as it would any other.
        arguments: Its arguments, as JSON knows them.
        environment: All variables of the process.
        imports: Modules that the server imports first, so that this process and all later ones have them. One that
            cannot be imported is left to those who need it.
    """

    entry: str
    arguments: Mapping[str, Any]
    environment: Mapping[str, str]
    imports: Sequence[str] = field(default=())


class ForkServer:
    """Runs work in forked processes, one after the other, for the time of a `with` block.

    The server ends with the block, or with the process that started it; a fork ends with the server.

    Args:
        prepare: `module:function` that the server calls before it forks, such as for imports that every process has.
        output: Descriptor of a file for what the server itself has to say.
        environment: Variables of the server, and what its imports see of the environment.
    """

    def __init__(self, prepare: str, output: int, environment: Mapping[str, str]) -> None:
        self._prepare, self._output, self._environment = prepare, output, dict(environment)
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._connection, theirs = socket.socketpair()
        command = [sys.executable, "-m", __name__, str(theirs.fileno()), str(os.getpid()), self._prepare]
        with theirs:
            self._process = subprocess.Popen(
                command,
                env=self._environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # It reads on and finds the end.
        self._connection.close()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def run(self, work: Work, tell: Callable[[str], None]) -> int:
        """Do work in a process of its own and return its exit code; that of a killed one is negative.

        Args:
            work: What to do.
            tell: Takes every line that the process writes, to its standard output or error.

        Raises:
            InfrastructureError: The server was killed, and with it the process.
        """
        message = json.dumps(asdict(work)).encode()
        with self._lock:
            reading, writing = os.pipe()
            with os.fdopen(reading, encoding="utf-8", errors="replace") as lines:
                try:
                    socket.send_fds(self._connection, [_LENGTH.pack(len(message))], [writing])
                    self._connection.sendall(message)
                except OSError as e:
                    raise self._gone() from e
                finally:
                    os.close(writing)
                for line in lines:
                    tell(line)
            with contextlib.suppress(OSError):
                if (answer := _exactly(self._connection, _CODE.size)) is not None:
                    return int(_CODE.unpack(answer)[0])
            raise self._gone()

    def _gone(self) -> InfrastructureError:
        code = self._process.wait()
        what = "the process that starts the tasks of this run"
        if code < 0:
            return killed_error(what, -code)
        return InfrastructureError(f"{what} ended with exit code {code}", "run it again to resume")


def main(argv: Sequence[str]) -> None:
    """Serve, and in each fork do its work.

    Args:
        argv: Descriptor of the socket, process id of the parent, `module:function` that prepares.
    """
    descriptor, parent, prepare = argv
    die_with_parent(signal.SIGKILL, int(parent))
    # Both reach everything on a terminal or in a service. Who asked for the work decides how it ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    collect_rarely()
    _function(prepare)()
    work = _serve(socket.socket(fileno=int(descriptor)))
    if work is not None:
        _function(work.entry)(**work.arguments)


def _serve(connection: socket.socket) -> Work | None:
    """Fork for every request. Returns work in the process that is to do it, and None in the server at its end."""
    server = os.getpid()
    while (request := _receive(connection)) is not None:
        work, output = request
        _import(work.imports)
        # What is imported stays: a collection in a fork would only copy it.
        gc.freeze()
        pid = os.fork()
        if pid == 0:
            die_with_parent(signal.SIGKILL, server)
            connection.close()
            _become(work, output)
            return work
        os.close(output)
        _, status = os.waitpid(pid, 0)
        # Nobody to tell is the end of the next read.
        with contextlib.suppress(OSError):
            connection.sendall(_CODE.pack(os.waitstatus_to_exitcode(status)))
    return None


def _become(work: Work, output: int) -> None:
    """Give a fork the signals, output and variables of a process that was started for its work."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    os.environ.clear()
    os.environ.update(work.environment)


def _receive(connection: socket.socket) -> tuple[Work, int] | None:
    header, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
    if not header:
        return None
    rest = _exactly(connection, _LENGTH.size - len(header))
    body = None if rest is None else _exactly(connection, int(_LENGTH.unpack(header + rest)[0]))
    return None if body is None else (Work(**json.loads(body)), descriptors[0])


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    """Return so many bytes, or None when the other side has gone."""
    found = bytearray()
    while len(found) < count:
        part = connection.recv(count - len(found))
        if not part:
            return None
        found += part
    return bytes(found)


def _function(entry: str) -> Callable[..., Any]:
    module, _, name = entry.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _import(modules: Iterable[str]) -> None:
    for module in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


if __name__ == "__main__":
    main(sys.argv[1:])
