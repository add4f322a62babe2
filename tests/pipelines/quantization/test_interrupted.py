"""A quantization that was killed goes on behind its last finished block, and ends with the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FEW = ("--samples", "6", "--eval-samples", "4", "--budget", "100", "--no-speed")
# Ends itself as `kill -9` would, when the second block of the tower has been written.
KILLED = """
import os, signal, sys
from nvila.quantization.resume import PartStates
save = PartStates.save
def save_and_die(self, number, block, errors):
    save(self, number, block, errors)
    if (self.part, number) == ("vision", 1):
        os.kill(os.getpid(), signal.SIGKILL)
PartStates.save = save_and_die
from nvila_pipelines.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("damaged", "notices"),
    [
        pytest.param(
            False,
            ["quantize vision: 2 finished blocks of an interrupted run are used"],
            marks=pytest.mark.slow,
        ),
        (
            True,
            [
                "vision-0000.safetensors is damaged and made again: its digest is another",
                "quantize vision: 1 finished blocks of an interrupted run are used",
            ],
        ),
    ],
    ids=["whole", "damaged"],
)
def test_a_killed_run_goes_on(
    damaged: bool,
    notices: list[str],
    nvila: Callable[..., Any],
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
) -> None:
    words = [str(word) for word in ("quantize", model_folder, "--data", data_file, *FEW)]
    child = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=tmp_path, capture_output=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    (blocks,) = tmp_path.glob("nvila-workspace/artifacts/quantize/*/blocks")
    assert sorted(path.name for path in blocks.glob("*.json")) == ["vision-0000.json", "vision-0001.json"]
    if damaged:
        first = blocks / "vision-0000.safetensors"
        content = bytearray(first.read_bytes())
        content[-1] ^= 1
        first.write_bytes(content)

    done = nvila(*words, "--json")
    assert done.code == 0, done.err
    assert [notice for notice in notices if notice not in done.err] == []
    assert "interrupted" in done.err
    assert not blocks.exists()

    whole = nvila(*words, "--workspace", tmp_path / "other", "--json")
    assert whole.code == 0, whole.err
    assert "interrupted" not in whole.err
    ours, theirs = (Path(one.last_json["path"]) / "model" / "model.safetensors" for one in (done, whole))
    assert ours != theirs
    assert ours.read_bytes() == theirs.read_bytes()
    assert done.last_json["report"] == whole.last_json["report"]
