"""Temporary folders: gone with their block, and gone after a kill once the next one is made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nvila_platform.scratch import scratch_folder

HOLD = """
import sys, time
from nvila_platform.scratch import scratch_folder
with scratch_folder("kind") as folder:
    (folder / "port").write_text("1")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def age(folder: Path, seconds: float = 7200.0) -> None:
    then = time.time() - seconds
    os.utime(folder, (then, then))


def test_it_is_gone_with_its_block_also_after_an_error(temporary: Path) -> None:
    held = scratch_folder("kind")
    folder = held.__enter__()
    assert folder.parent == temporary
    error = KeyError()
    assert not held.__exit__(KeyError, error, None)
    assert not folder.exists()


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(temporary: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        age(left)
        with scratch_folder("kind"):
            assert left.exists(), "in use"
        process.send_signal(signal.SIGKILL)
    with scratch_folder("kind"):
        assert not left.exists()
    assert list(temporary.iterdir()) == []


def test_young_folders_other_kinds_and_links_are_left_alone(temporary: Path) -> None:
    young, other, target = (temporary / name for name in ("kind-young", "other-old", "target"))
    for folder in (young, other, target):
        folder.mkdir()
    age(other)
    age(target)
    (temporary / "kind-link").symlink_to(target)
    with scratch_folder("kind"):
        pass
    assert young.exists()
    assert other.exists()
    assert target.exists()
