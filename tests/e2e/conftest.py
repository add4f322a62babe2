"""`nvila` as its users start it: a process of its own, watched and killed from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

MICRO = Path(__file__).resolve().parents[1] / "fixtures" / "micro.yaml"
_NVILA = "import sys; from nvila_pipelines.cli import main; sys.exit(main())"
_DEADLINE_S = 540.0


@dataclass
class Command:
    """One `nvila` process."""

    process: subprocess.Popen[str]
    out: str = ""
    err: str = ""

    def finish(self) -> int:
        """Wait for the end and return the exit code."""
        self.out, self.err = self.process.communicate(timeout=_DEADLINE_S)
        return self.process.returncode

    @property
    def json(self) -> dict[str, Any]:
        """The last line of standard output."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found

    @property
    def error(self) -> list[str]:
        """The lines of the report of a failure."""
        lines = self.err.splitlines()
        start = max(index for index, line in enumerate(lines) if line.startswith("error: "))
        return lines[start:]


@dataclass
class Workspace:
    """A workspace and the commands that were started in it."""

    path: Path
    commands: list[Command] = field(default_factory=list)

    def start(self, verb: str, *words: str, **variables: str) -> Command:
        """Start `nvila VERB micro --json` in the workspace."""
        return self._start(verb, str(MICRO), *words, **variables)

    def graph(self, name: str, *words: str, **variables: str) -> Command:
        """Run `nvila pipeline run GRAPH` to its end, which must be a good one."""
        command = self._start("pipeline", "run", name, *words, **variables)
        assert command.finish() == 0, command.err
        return command

    def _start(self, *words: str, **variables: str) -> Command:
        env = {name: value for name, value in os.environ.items() if not name.startswith("NVILA_")}
        env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **variables}
        command = [sys.executable, "-c", _NVILA, *words, "--workspace", str(self.path), "--json"]
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.path.parent
        )
        self.commands.append(Command(process))
        return self.commands[-1]

    def run(self, verb: str, *words: str, **variables: str) -> Command:
        """Run `nvila VERB micro` to its end, which must be a good one."""
        command = self.start(verb, *words, **variables)
        assert command.finish() == 0, command.err
        return command

    def events(self, run_id: str = "*") -> list[dict[str, Any]]:
        """All events of a run, or of every run."""
        paths = sorted(self.path.glob(f"runs/{run_id}/events.jsonl"), key=lambda path: path.stat().st_ctime)
        return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]

    def phases(self, run_id: str) -> dict[str, str]:
        """The last phase of every step of a run."""
        return {event["step"]: event["phase"] for event in self.events(run_id) if "phase" in event}

    def wait_for(self, **wanted: object) -> None:
        """Wait for an event with these values."""
        deadline = time.monotonic() + _DEADLINE_S
        while time.monotonic() < deadline:
            if any(all(event.get(name) == value for name, value in wanted.items()) for event in self.events()):
                return
            running = [command for command in self.commands if command.process.poll() is None]
            assert running, "nothing runs any more, and the event never came"
            time.sleep(0.05)
        raise AssertionError(f"no event {wanted}")

    def processes(self, words: str = "") -> list[int]:
        """Ids of living processes that work in the workspace and have the words in their command line."""
        found = []
        mine = f"NVILA_WORKSPACE={self.path}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                try:
                    works_here = mine in (entry / "environ").read_bytes().split(b"\0")
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue
                # The command line of a process that has ended and was not waited for is empty.
                if works_here and line and words in line:
                    found.append(int(entry.name))
        return found

    def artifact(self, step: str) -> Path:
        """The only finished artifact of a step."""
        (manifest,) = self.path.glob(f"artifacts/{step}/*/manifest.json")
        return manifest.parent

    def digest(self, step: str) -> str:
        """Its digest."""
        return str(json.loads((self.artifact(step) / "manifest.json").read_text(encoding="utf-8"))["digest"])


@pytest.fixture(scope="module")
def make_workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Workspace]]:
    made: list[Workspace] = []

    def make() -> Workspace:
        made.append(Workspace(tmp_path_factory.mktemp("e2e") / "work space"))
        return made[-1]

    yield make
    for workspace in made:
        for pid in [command.process.pid for command in workspace.commands if command.process.poll() is None]:
            os.kill(pid, signal.SIGKILL)
        for pid in workspace.processes():
            os.kill(pid, signal.SIGKILL)
        for command in workspace.commands:
            command.process.communicate()
