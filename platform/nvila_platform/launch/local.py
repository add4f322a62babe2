"""Processes on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from nvila.errors import ConfigError, NvilaError
from nvila_platform.artifacts import storage_errors
from nvila_platform.launch.outcome import RAISED, killed_error, left_error
from nvila_platform.settings import ERROR_FILE

_CHILD = "nvila_platform.launch.child"
_LOOPBACK = "127.0.0.1"
_TAIL_LINES = 20
_TAIL_BYTES = 16_384
# Training finishes its step and saves it. Kubernetes gives 30 seconds before it kills.
_STOP_TIMEOUT_S = 25.0
# Threads that wait spin for some microseconds and then sleep. The default of milliseconds costs several times the work
# itself as soon as the machine is busy; never spinning costs half the speed when it is idle.
_SPIN_COUNT = "20000"
_GROUP_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class LocalLauncher:
    """Runs a module in processes of this machine that die with this process.

    SIGTERM to this process goes on to them, and this process ends as they do: a module may finish what it is doing.
    """

    def run(
        self, module: str, args: Sequence[str], *, num_processes: int, env: Mapping[str, str], log_path: Path
    ) -> None:
        """Run a module to its end; see `Launcher.run`.

        Raises:
            NvilaError: The module failed. Without a typed error, the hint holds the log's last lines.
            InfrastructureError: A process was killed; the message names the signal.
        """
        if num_processes < 1:
            raise ConfigError(f"num_processes={num_processes} is not a number of processes", "use 1 or more")
        with storage_errors(log_path):
            log_path.parent.mkdir(parents=True, exist_ok=True)
            log = log_path.open("ab")
            # Beside the log, because nothing is written outside the workspace.
            scratch = tempfile.TemporaryDirectory(dir=log_path.parent, prefix=".launch-")
        with log, scratch:
            start = log.tell()
            error_path = Path(scratch.name) / "error.json"
            environment = _environment(env, num_processes) | {ERROR_FILE: str(error_path)}
            code = _run(_command(module, args, num_processes, scratch.name), environment, log.fileno())
            if code != 0:
                raise _failure(module, code, error_path, log_path, start)


def _command(module: str, args: Sequence[str], num_processes: int, scratch: str) -> list[str]:
    child = [sys.executable, "-m", _CHILD, str(os.getpid())]
    if num_processes == 1:
        return [*child, "SIGKILL", module, *args]
    # The agent gets SIGTERM, so that it can take its workers along; the workers watch the agent in turn.
    agent = [*child, "SIGTERM", "torch.distributed.run", "--standalone", f"--local-addr={_LOOPBACK}"]
    agent += [f"--nproc-per-node={num_processes}", f"--log-dir={scratch}"]
    return [*agent, "-m", _CHILD, "0", "SIGKILL", module, *args]


def calm_threads() -> None:
    """Keep waiting threads of this process from spinning; has an effect before torch is imported."""
    os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)


def _environment(env: Mapping[str, str], num_processes: int) -> dict[str, str]:
    # This process may itself be one rank of a larger group; the child starts its own.
    inherited = {name: value for name, value in os.environ.items() if name not in _GROUP_VARIABLES}
    defaults = {
        # The working folder is not a place to import from: a folder named docker/ would shadow the SDK.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "GOMP_SPINCOUNT": _SPIN_COUNT,
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_processes)),
    }
    environment = defaults | inherited | dict(env)
    if num_processes == 1:
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": _LOOPBACK, "MASTER_PORT": str(_free_port())}
    return environment


def _run(command: Sequence[str], environment: Mapping[str, str], output: int) -> int:
    process = subprocess.Popen(
        command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
    )
    try:
        with _passing_on(signal.SIGTERM, process):
            return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _passing_on(number: signal.Signals, process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Send a signal that comes to this process to its child, which decides how to end.

    Elsewhere than in the main thread signals stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, lambda received, _: process.send_signal(received))
    try:
        yield
    finally:
        signal.signal(number, before)


def _failure(module: str, code: int, error_path: Path, log_path: Path, start: int) -> NvilaError:
    error, cause = left_error(error_path) or (None, "")
    if error is not None and cause == RAISED:
        return error
    if error is None:
        failed = NvilaError(f"{module} failed with exit code {code}")
        error = killed_error(module, -code) if code < 0 else failed
    hint = "; ".join(filter(None, (error.hint, f"log: {log_path}")))
    return type(error)(error.message, hint + log_tail(log_path, start))


def log_tail(log_path: Path, start: int) -> str:
    """Return the last lines that a run wrote, ready to follow a hint.

    Args:
        log_path: The log.
        start: Where the run's part of it begins.
    """
    if not log_path.is_file():
        return ""
    with log_path.open("rb") as log:
        end = log.seek(0, os.SEEK_END)
        log.seek(max(start, end - _TAIL_BYTES))
        lines = log.read().decode("utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    return "".join(f"\n{line}" for line in lines)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])
