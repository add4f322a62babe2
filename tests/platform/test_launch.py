"""The local launcher with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nvila.errors import ConfigError, DataError, InfrastructureError, NvilaError, ResourceError
from nvila_platform.launch import Launcher, LocalLauncher
from nvila_platform.launch.outcome import KILLED, RAISED, leave_error, left_error
from nvila_platform.settings import Settings

Launch = Callable[..., str]

HEADER = "import json, os, signal, sys, time\nfrom pathlib import Path\n"
REPORT = """
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "NVILA_EXPERIMENT")
found = {"args": sys.argv[1:], "port": int(os.environ["MASTER_PORT"]) > 0}
print(json.dumps(found | {name: os.environ[name] for name in names}))
print("to stderr", file=sys.stderr)
"""


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Launch a module with the given source and return its log."""

    def run(source: str, *args: str, num_processes: int = 1, env: dict[str, str] | None = None) -> str:
        (tmp_path / "job_under_test.py").write_text(HEADER + source)
        launcher: Launcher = LocalLauncher()
        log_path = tmp_path / "logs" / "job.log"
        launcher.run(
            "job_under_test",
            args,
            num_processes=num_processes,
            env={"PYTHONPATH": str(tmp_path), "NVILA_EXPERIMENT": "", "OMP_NUM_THREADS": "1"} | (env or {}),
            log_path=log_path,
        )
        return log_path.read_text()

    return run


def test_one_process_has_a_group_of_one(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("WORLD_SIZE", "8")
    log = launch(REPORT, "--lr", "1e-3", "--", "-m", env={"NVILA_EXPERIMENT": "mine"})
    assert (
        '"args": ["--lr", "1e-3", "--", "-m"], "port": true, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"' in log
    )
    assert '"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "NVILA_EXPERIMENT": "mine"' in log
    assert "to stderr" in log


def test_the_child_loads_the_settings_of_its_parent(launch: Launch, tmp_path: Path) -> None:
    settings = Settings.load(tmp_path / "ws", {"NVILA_EXPERIMENT": "mine", "NVILA_S3_SECURE": "false"})
    source = "from nvila_platform.settings import Settings\nprint(Settings.load())"
    assert launch(source, env=settings.to_env()).strip() == repr(settings)


def test_the_child_collects_garbage_rarely(launch: Launch) -> None:
    assert launch("import gc\nprint(gc.get_threshold())").strip() == "(100000, 20, 100)"


def test_the_log_is_appended(launch: Launch) -> None:
    launch("print('first run')")
    assert launch("print('second run')") == "first run\nsecond run\n"


def test_two_processes_form_a_group_on_loopback(launch: Launch, tmp_path: Path) -> None:
    source = """
import torch.distributed as dist
from datetime import timedelta
import torch
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
number = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(number)
where = os.environ["MASTER_ADDR"]
print(f"rank {dist.get_rank()} of {dist.get_world_size()} sees {number.item()} at {where} {sys.argv[1:]}")
dist.destroy_process_group()
"""
    log = launch(source, "--lr", "1", num_processes=2)
    assert os.listdir(tmp_path / "logs") == ["job.log"]
    for rank in (0, 1):
        assert f"rank {rank} of 2 sees 3.0 at 127.0.0.1 ['--lr', '1']" in log


TYPED = """
from nvila.errors import DataError
if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
    raise DataError("train.jsonl:3: broken JSON", "repair or remove the line")
time.sleep(60)
"""


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_typed_error_comes_back_as_it_was_raised(launch: Launch, tmp_path: Path, num_processes: int) -> None:
    with pytest.raises(DataError) as caught:
        launch(TYPED, num_processes=num_processes)
    assert caught.value.message == "train.jsonl:3: broken JSON"
    assert caught.value.hint == "repair or remove the line"
    assert "DataError: train.jsonl:3" in (tmp_path / "logs" / "job.log").read_text()


def test_the_first_error_of_several_processes_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("NVILA_ERROR_FILE", str(path))
    leave_error(DataError("the cause", "the fix"))
    leave_error(InfrastructureError("the peer went away"), KILLED)
    left = left_error(path)
    assert left is not None
    assert (type(left[0]), left[0].message, left[0].hint, left[1]) == (DataError, "the cause", "the fix", RAISED)
    assert os.listdir(tmp_path) == ["error.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cause": "raised"'])
def test_an_unreadable_error_file_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "error.json").write_text(text)
    assert left_error(tmp_path / "error.json") is None
    assert left_error(tmp_path / "missing.json") is None


def test_an_untyped_failure_shows_the_last_lines_of_this_run(launch: Launch, tmp_path: Path) -> None:
    launch("print('an earlier run')")
    with pytest.raises(NvilaError) as caught:
        launch("for n in range(30): print('line', n)\nsys.exit(3)")
    assert caught.value.message == "job_under_test failed with exit code 3"
    head, *tail = caught.value.hint.splitlines()
    assert head == f"log: {tmp_path / 'logs' / 'job.log'}"
    assert tail == [f"line {n}" for n in range(10, 30)]
    with pytest.raises(NvilaError) as caught:
        launch("raise ValueError('a bug')")
    assert "an earlier run" not in caught.value.hint
    assert caught.value.hint.endswith("ValueError: a bug")


def test_a_module_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NvilaError, match="no_such_module_here failed with exit code 1"):
        LocalLauncher().run("no_such_module_here", [], num_processes=1, env={}, log_path=tmp_path / "log")


def test_a_killed_process_is_worth_another_try(launch: Launch) -> None:
    with pytest.raises(InfrastructureError, match="job_under_test was killed by SIGKILL") as caught:
        launch("print('last words', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)")
    assert "out of memory" in caught.value.hint
    assert caught.value.hint.endswith("last words")


def test_a_killed_rank_is_named(launch: Launch) -> None:
    source = """
print("last words", flush=True)
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
    with pytest.raises(InfrastructureError, match="rank 1 was killed by SIGKILL") as caught:
        launch(source, num_processes=2)
    assert "log: " in caught.value.hint
    assert len(caught.value.hint.splitlines()) == 21


@pytest.mark.parametrize("num_processes", [0, -1])
def test_a_group_of_none_is_refused(launch: Launch, num_processes: int) -> None:
    with pytest.raises(ConfigError, match=f"num_processes={num_processes}"):
        launch("", num_processes=num_processes)


def test_a_log_in_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(ConfigError, match="cannot write"):
        LocalLauncher().run("json.tool", [], num_processes=1, env={}, log_path=tmp_path / "logs" / "job.log")


def test_a_full_disk_under_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ResourceError, match="no space left"):
        LocalLauncher().run("json.tool", [], num_processes=1, env={}, log_path=tmp_path / "job.log")


PARENT = """
import sys
from pathlib import Path
from nvila_platform.launch import LocalLauncher
folder, num_processes = Path(sys.argv[1]), int(sys.argv[2])
env = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
LocalLauncher().run("sleeper", [str(folder)], num_processes=num_processes, env=env, log_path=folder / "log")
"""
SLEEPER = """
import os, sys, time
from pathlib import Path
part = Path(sys.argv[1]) / f"{os.environ['RANK']}.part"
part.write_text(str(os.getpid()))
part.rename(part.with_suffix(".pid"))
time.sleep(120)
"""


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of this machine has no parent-death signal")
@pytest.mark.parametrize(
    ("num_processes", "end"), [(1, signal.SIGKILL), (1, signal.SIGINT), (2, signal.SIGKILL)], ids=str
)
def test_children_die_with_their_parent(tmp_path: Path, num_processes: int, end: signal.Signals) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    command = [sys.executable, "-c", PARENT, str(tmp_path), str(num_processes)]
    parent = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    pids: list[int] = []
    try:
        wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == num_processes, 60, "the children did not start")
        pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
        assert all(is_running(pid) for pid in pids)
        parent.send_signal(end)
        parent.wait(20)
        wait_for(lambda: not any(is_running(pid) for pid in pids), 40, "a child outlived its parent")
    finally:
        parent.kill()
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)


STOPPED = """
import sys
from nvila.errors import NvilaError
try:
    exec(sys.stdin.read())
except NvilaError as e:
    print(type(e).__name__, e.message)
    raise SystemExit(e.exit_code)
"""
SAVER = """
import os, signal, sys, time
from pathlib import Path
from nvila.errors import InfrastructureError
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
part = Path(sys.argv[1]) / f"{os.environ['RANK']}.part"
part.write_text("")
part.rename(part.with_suffix(".pid"))
while not asked:
    time.sleep(0.02)
time.sleep(0.3)
part.with_suffix(".saved").write_text("")
raise InfrastructureError("stopped and saved", "run it again")
"""


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_goes_on_to_the_children_who_may_finish(tmp_path: Path, num_processes: int) -> None:
    (tmp_path / "sleeper.py").write_text(SAVER)
    command = [sys.executable, "-c", STOPPED, str(tmp_path), str(num_processes)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdin is not None
        parent.stdin.write(PARENT)
        parent.stdin.close()
        wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == num_processes, 60, "the children did not start")
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(30) == 75
        assert parent.stdout is not None
        assert parent.stdout.read() == "InfrastructureError stopped and saved\n"
        assert len(list(tmp_path.glob("*.saved"))) == num_processes
    finally:
        parent.kill()
        parent.wait()


def test_a_child_whose_parent_is_gone_ends_at_once() -> None:
    command = [sys.executable, "-m", "nvila_platform.launch.child", str(os.getpid() + 1), "SIGKILL", "json.tool"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    assert "is gone" in done.stderr
