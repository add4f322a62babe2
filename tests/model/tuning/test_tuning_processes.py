"""Tuning in two processes: the same losses as in one, and a killed run goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nvila.tuning.held_out import read_losses

WORKER = Path(__file__).with_name("worker.py")
# A busy machine takes its time.
_PATIENCE_S = 800


class Group:
    """Starts jobs in processes of one group."""

    def __init__(self, folder: Path, **common: Any) -> None:
        self._folder, self._common = folder, common

    def run(self, name: str, processes: int, **job: Any) -> list[int]:
        """Do a job and return how each process ended."""
        order = self._folder / f"{name}.json"
        order.write_text(json.dumps({"out": str(self._folder / name), **self._common, **job}), encoding="utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        env = os.environ | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        running = [
            subprocess.Popen([sys.executable, str(WORKER), str(order)], env=env | {"RANK": str(rank)})
            for rank in range(processes)
        ]
        try:
            return [process.wait(_PATIENCE_S) for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()

    def steps(self, name: str) -> list[list[float]]:
        """Return step, loss, norm of the gradient and samples of every step."""
        lines = (self._folder / f"{name}.steps").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def group(colors: Path, saved_model: Path, tmp_path: Path) -> Group:
    return Group(tmp_path, base=str(saved_model), data=str(colors), index=str(tmp_path / "index"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["ln+lora", "full+full"])
def test_two_processes_learn_what_one_does(group: Group, method: str, tmp_path: Path) -> None:
    for name, processes in (("one", 1), ("two", 2)):
        assert group.run(name, processes, method=method, dropout=0.0) == [0] * processes
    one, two = group.steps("one"), group.steps("two")
    assert len(one) == 6
    for ours, theirs in zip(one, two, strict=True):
        assert ours[3] == theirs[3] > 1
        assert theirs[1:3] == pytest.approx(ours[1:3], rel=1e-3)
    losses = [[found.loss for found in read_losses(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_of_two_processes_goes_on_to_the_same_weights(group: Group, tmp_path: Path) -> None:
    common = {"method": "ln+lora", "dropout": 0.05}
    assert group.run("whole", 2, **common) == [0, 0]
    ended = group.run("cut", 2, kill_at=5, **common)
    assert ended[0] == -signal.SIGKILL
    assert ended[1] != 0
    assert not (tmp_path / "cut" / "model").exists()
    assert group.run("cut", 2, **common) == [0, 0]
    assert [step[0] for step in group.steps("cut")] == [5, 6]
    assert group.steps("cut") == group.steps("whole")[4:]
    assert read_losses(tmp_path / "cut") == read_losses(tmp_path / "whole")
    for file in ("trained.safetensors", "adapter_model.safetensors"):
        assert (tmp_path / "cut/model" / file).read_bytes() == (tmp_path / "whole/model" / file).read_bytes()
