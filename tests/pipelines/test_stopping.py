"""A signal to the command reaches the running task, which saves; the command ends behind it and leaves no process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from nvila_platform.launch.stopping import GRACE_S, RunStop, Terminated, stoppable_task, terminable

MICRO = Path(__file__).parents[1] / "fixtures" / "micro.yaml"
GO_ON = "interrupted: the same command goes on where this one stopped"

# What the command does, around a pipeline of one task.
COMMAND = """
import argparse, sys
from pathlib import Path
from nvila_pipelines.cli.failures import guarded
from nvila_pipelines.local_pipeline import run_compiled
from nvila_platform.settings import Settings
settings = Settings.load(Path(sys.argv[1]), {})
def work():
    log = settings.workspace / "run.log"
    tell = lambda text: print(text, file=sys.stderr, flush=True)
    run_compiled(Path(sys.argv[2]), {"recipe": "{}", "run_id": "r"}, settings, log, tell)
    return 0
sys.exit(guarded(work, argparse.Namespace(debug=False, json=False, workspace=settings.workspace)))
"""
TASK = """
    import os, sys, time
    from pathlib import Path
    from nvila_platform.launch.stopping import Terminated, stoppable_task
    from nvila_platform.settings import tasks_folder
    here = Path(os.environ["NVILA_TASKS_FOLDER"]).parent
    try:
        with stoppable_task(tasks_folder()):
            (here / "pid.part").write_text(str(os.getpid()))
            (here / "pid.part").rename(here / "pid")
            time.sleep(60)
    except Terminated:
        time.sleep(0.3)
        (here / "saved").touch()
        sys.exit(75)
"""


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, "the command ended by itself"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, as on a terminal of its own; nothing of it is left behind."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize(
    ("number", "to_group", "code", "last"),
    [
        (signal.SIGTERM, False, 75, "  fix: run the same command again to go on"),
        # A terminal sends Ctrl-C to everything that runs on it.
        (signal.SIGINT, True, 130, GO_ON),
        (signal.SIGINT, False, 130, GO_ON),
    ],
    ids=["terminate", "keyboard", "interrupt"],
)
def test_a_signal_to_the_command_lets_the_task_save(
    number: signal.Signals, to_group: bool, code: int, last: str, one_task: Callable[[str], Path], tmp_path: Path
) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    with started([sys.executable, "-c", COMMAND, str(workspace), str(one_task(TASK.strip()))]) as process:
        wait_for((workspace / "pid").exists, process)
        if to_group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert (workspace / "saved").exists()
    lines = [line for line in told.splitlines() if line]
    assert lines[0].startswith(f"{number.name}: the running step saves what it has")
    assert lines[-1] == last
    assert len(lines) == (3 if code == 75 else 2)
    assert "Traceback" not in told
    assert not is_running(int((workspace / "pid").read_text()))
    assert {path.name for path in workspace.iterdir()} == {"pid", "saved", "run.log"}


def test_a_task_that_starts_behind_the_signal_does_nothing(tmp_path: Path) -> None:
    stop = RunStop(tmp_path, lambda _: None)
    with stop.watching():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == signal.SIGTERM
    with pytest.raises(Terminated, match="before this task started"), stoppable_task(tmp_path):
        pytest.fail("the task went on")
    assert [path.name for path in tmp_path.iterdir()] == ["stop"]


@pytest.mark.parametrize("second", [signal.SIGINT, None], ids=["second-interrupt", "grace"])
def test_a_task_that_does_not_end_is_killed(
    second: signal.Signals | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvila_platform.launch.stopping.GRACE_S", 600.0 if second else 0.2)
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as task:
        assert task.stdout is not None
        task.stdout.readline()
        (tmp_path / f"task-{task.pid}").touch()
        stop = RunStop(tmp_path, lambda _: None)
        with stop.watching():
            os.kill(os.getpid(), signal.SIGINT)
            if second:
                assert task.poll() is None
                os.kill(os.getpid(), second)
            assert task.wait(60) == -signal.SIGKILL
    assert stop.signal == signal.SIGINT


def test_sigterm_outside_of_a_run_unwinds(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="stopped by SIGTERM"), terminable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    # Handlers can be set in the main thread alone; elsewhere nothing changes.
    ran: list[bool] = []

    def elsewhere() -> None:
        with stoppable_task(tmp_path), RunStop(tmp_path, lambda _: None).watching():
            ran.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert ran == [True]


def test_the_grace_is_shorter_than_that_of_kubernetes() -> None:
    assert 25.0 < GRACE_S < 30.0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_run_goes_on_with_the_same_command(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("nvila")), "run", str(MICRO), "--workspace", str(tmp_path)]
    command += ["train.stages.instruct.steps=3000"]

    def lines(seen: set[Path]) -> list[dict[str, object]]:
        logs = set(tmp_path.glob("runs/*/events.jsonl")) - seen
        return [json.loads(line) for log in logs for line in log.read_text().splitlines()]

    first = 0
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        seen = set(tmp_path.glob("runs/*/events.jsonl"))
        with started(command) as process:
            # What it prints would fill the pipe.
            threading.Thread(target=process.stdout.read, daemon=True).start()  # type: ignore[union-attr]
            told: list[str] = []
            threading.Thread(target=lambda p=process, t=told: t.extend(p.stderr), daemon=True).start()
            wait_for(lambda s=seen: any(e.get("phase") == "instruct" for e in lines(s)), process)  # type: ignore[misc]
            if number == signal.SIGINT:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            assert process.wait(60) == code
        saved = [path.name for path in tmp_path.glob("artifacts/**/.checkpoints/4-instruct/step-*")]
        assert saved
        steps = [int(name.removeprefix("step-")) for name in saved]
        if first:
            notices = [str(e.get("notice")) for e in lines(seen)]
            assert f"stage instruct goes on from its checkpoint after step {first}" in notices
        assert max(steps) > first
        first = max(steps)
