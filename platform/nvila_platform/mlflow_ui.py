"""MLflow's web interface on the workspace's own database."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from nvila.errors import ConfigError, InfrastructureError, ResourceError
from nvila_platform.mlflow_backend import configure_environment, database_path, prepare_database, without_password

if TYPE_CHECKING:
    from nvila_platform.settings import Settings

logger = logging.getLogger(__name__)

_START_S = 120.0
_STOP_S = 10.0


def start_ui(settings: Settings, host: str = "127.0.0.1", port: int = 5000) -> UiServer:
    """Start MLflow's server on the workspace and wait until it answers.

    Args:
        settings: Names the database and the workspace.
        host: Address to listen on; loopback unless the user asks for more.
        port: Port to listen on; 0 takes a free one.

    Raises:
        ConfigError: Tracking goes to a server already, which has its own interface.
        ResourceError: The port is taken.
        InfrastructureError: The server did not come up; the message holds the last line of its log.
    """
    if database_path(settings.tracking_uri) is None:
        address = without_password(settings.tracking_uri)
        raise ConfigError(f"tracking goes to {address}, not to this workspace", f"open {address} in a browser")
    port = _free_port(host, port)
    configure_environment()
    prepare_database(settings)
    log_path = settings.workspace / "logs" / "mlflow-ui.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            _command(settings, host, port),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            # A group of its own: the server's workers are stopped with it, and Ctrl-C reaches us first.
            start_new_session=True,
        )
    server = UiServer(process, host, port, log_path)
    try:
        server.wait_ready(_START_S)
    except BaseException:
        server.stop()
        raise
    return server


class UiServer:
    """A running interface; stops when left as a context manager."""

    def __init__(self, process: subprocess.Popen[bytes], host: str, port: int, log_path: Path) -> None:
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.log_path = log_path
        self._host = host
        self._port = port
        self._process = process

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the server answers its health check.

        Raises:
            InfrastructureError: It ended or stayed silent.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise InfrastructureError(f"MLflow's server ended: {self._last_line()}", f"its log is {self.log_path}")
            if self._healthy():
                return
            time.sleep(0.1)
        raise InfrastructureError(f"MLflow's server gave no answer in {timeout_s:g} s", f"its log is {self.log_path}")

    def wait(self) -> int:
        """Serve until SIGINT or SIGTERM arrives or the server ends by itself, then stop it.

        Returns:
            0 after a signal, otherwise the exit status of the server.
        """
        with _signals() as stopped:
            while not stopped.is_set() and self._process.poll() is None:
                stopped.wait(0.2)
        ended = self._process.poll()
        self.stop()
        return 0 if ended is None else ended

    def stop(self, timeout_s: float = _STOP_S) -> None:
        """Stop the server and its workers, by force after the time limit; harmless when it has stopped."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            logger.warning("MLflow's server did not stop in %g s and is killed", timeout_s)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> UiServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _last_line(self) -> str:
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else f"exit status {self._process.returncode}"


def _command(settings: Settings, host: str, port: int) -> list[str]:
    # -P: with the current folder on the path, a checkout's own folders could stand in for packages of that name.
    return [
        *(sys.executable, "-P", "-m"),
        # Ends the server also when this process is killed without a chance to do so.
        *("nvila_platform.launch.child", str(os.getpid()), "SIGTERM"),
        *("mlflow", "server"),
        *("--host", host, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", settings.tracking_uri),
        *("--artifacts-destination", str(settings.workspace / "mlartifacts")),
    ]


def _free_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the server does: a port whose last connections still drain is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"port {port} of {host} cannot be used: {error.strerror or error}",
                "choose another port, 0 for a free one",
            ) from error
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """Turn SIGINT and SIGTERM into an event; elsewhere than in the main thread signals stay as they are."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
