"""Processes forked from a server: what they are given, how they end, and who ends with whom."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nvila.errors import InfrastructureError
from nvila_platform.launch.fork_server import ForkServer, Work

# Imported by the server and its forks from a folder of the test.
MODULE = """
import os, signal, sys, time

prepared = []

def prepare():
    prepared.append(os.getpid())

def say(text):
    print(text, os.getpid(), *prepared, os.environ.get("GIVEN"), os.environ.get("KEPT"), flush=True)
    print("to the standard error", file=sys.stderr)
    raise SystemExit(3)

def modules():
    print("fractions" in sys.modules, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
    sys.modules["changed"] = sys

def fail():
    raise ValueError("broken on purpose")

def killed(number):
    os.kill(os.getpid(), number)

def wait(file):
    with open(file, "w") as out:
        out.write(f"{os.getpid()} {os.getppid()}")
    os.rename(file, file + ".done")
    time.sleep(60)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "forked_work.py").write_text(MODULE)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return dict(os.environ) | {"PYTHONPATH": path, "KEPT": "by the server"}


@pytest.fixture
def server(environment: dict[str, str], tmp_path: Path) -> Iterator[ForkServer]:
    with (
        (tmp_path / "server.log").open("w") as log,
        ForkServer("forked_work:prepare", log.fileno(), environment) as one,
    ):
        yield one


def work(name: str, *imports: str, **arguments: Any) -> Work:
    return Work(entry=f"forked_work:{name}", arguments=arguments, environment={"GIVEN": "to it"}, imports=imports)


def is_running(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_each_fork_is_a_process_with_its_output_variables_and_exit_code(server: ForkServer) -> None:
    told: list[list[str]] = []
    for text in ("one", "two"):
        lines: list[str] = []
        assert server.run(work("say", text=text), lines.append) == 3
        told.append(lines)
        assert lines[1] == "to the standard error\n"
    words = [lines[0].split() for lines in told]
    assert [line[0] for line in words] == ["one", "two"]
    # Two processes, none of them the one that prepared, which was one for both.
    assert len({line[1] for line in words}) == 2
    assert words[0][2] == words[1][2] not in {line[1] for line in words}
    # The variables are those of the work and no others.
    assert words[0][3:] == ["to", "it", "None"]


def test_what_one_fork_changes_no_other_sees_and_what_the_server_imports_all_have(server: ForkServer) -> None:
    lines: list[str] = []
    assert server.run(work("modules"), lines.append) == 0
    assert server.run(work("modules", "fractions", "there_is_no_such_module"), lines.append) == 0
    assert server.run(work("modules"), lines.append) == 0
    assert lines == ["False True\n", "True True\n", "True True\n"]
    assert server.run(Work(entry="changed:exit", arguments={}, environment={}), lines.append) == 1
    assert lines[-1] == "ModuleNotFoundError: No module named 'changed'\n"


def test_an_exception_is_a_traceback_and_exit_code_1(server: ForkServer) -> None:
    lines: list[str] = []
    assert server.run(work("fail"), lines.append) == 1
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "ValueError: broken on purpose\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_killed_fork_says_by_what(server: ForkServer, number: signal.Signals) -> None:
    assert server.run(work("killed", number=int(number)), lambda _: None) == -number


def test_the_server_leaves_signals_to_its_forks_and_ends_with_the_block(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with ForkServer("forked_work:prepare", 2, environment) as server:
        pid = server._process.pid
        server.run(work("modules"), lambda _: None)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        assert server.run(work("modules"), lambda _: None) == 0
    assert not is_running(pid)


def test_a_killed_server_takes_its_fork_along_and_is_an_error_that_says_so(
    environment: dict[str, str], tmp_path: Path
) -> None:
    killer = (
        "import os, signal, sys, time\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.02)\n"
        "os.kill(int(open(sys.argv[1]).read().split()[1]), signal.SIGKILL)\n"
    )
    done = tmp_path / "pids.done"
    with ForkServer("forked_work:prepare", 2, environment) as server:
        with (
            subprocess.Popen([sys.executable, "-c", killer, str(done)]),
            pytest.raises(InfrastructureError, match=r"starts the tasks of this run was killed by SIGKILL"),
        ):
            server.run(work("wait", file=str(tmp_path / "pids")), lambda _: None)
        with pytest.raises(InfrastructureError, match="SIGKILL"):
            server.run(work("modules"), lambda _: None)
    wait_until(lambda: not is_running(int(done.read_text().split()[0])))


def test_server_and_fork_end_with_the_process_that_started_them(environment: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from nvila_platform.launch.fork_server import ForkServer, Work\n"
        "work = Work(entry='forked_work:wait', arguments={'file': sys.argv[1]}, environment=dict(os.environ))\n"
        "with ForkServer('forked_work:prepare', 2, dict(os.environ)) as server:\n"
        "    server.run(work, print)\n"
    )
    done = tmp_path / "pids.done"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pids")], env=environment) as process:
        wait_until(done.exists)
        process.kill()
    pids = [int(pid) for pid in done.read_text().split()]
    wait_until(lambda: not any(map(is_running, pids)))
