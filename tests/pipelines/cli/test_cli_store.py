"""`nvila store`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nvila_pipelines.cli.app import main
from nvila_platform.store import LocalStore


def test_gc_lists_first_and_deletes_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = LocalStore(tmp_path / "artifacts")
    old = store.work_dir("train", "0" * 64)
    (old / "half.bin").write_bytes(b"x" * 1000)
    for path in (old / "half.bin", old):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    young = store.work_dir("train", "1" * 64)
    command = ["store", "gc", "--workspace", str(tmp_path)]
    assert main(command) == 0
    assert "--delete removes them: 1 things" in capsys.readouterr().out
    assert old.exists()
    assert main([*command, "--delete", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["deleted"], said["size_bytes"], [row["kind"] for row in said["found"]]) == (True, 1000, ["unfinished"])
    assert not old.exists()
    assert young.exists()
    assert main(command) == 0
    assert "found 0 things" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["14", "d", "0d", "1y"])
def test_an_age_needs_a_unit(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "gc", "--older-than", text]) == 2
    assert "write 12h, 14d or 4w" in capsys.readouterr().err
