"""The tutorial of docs/tuning.md, command by command, on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def blocks(name: str) -> str:
    """Return the code block behind a mark in the page."""
    page = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- tutorial:{name} -->\n```\w+\n(.*?)```", page, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_tutorial_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image
    from tests.pipelines.tuning.conftest import build_base

    from nvila_pipelines.cli import main

    monkeypatch.chdir(tmp_path)
    build_base(tmp_path / "MODEL")
    line = json.loads(blocks("data"))
    (tmp_path / "my-data" / "images").mkdir(parents=True)
    lines = []
    for number in range(24):
        color = ("red", "green", "blue")[number % 3]
        name = line["image"].replace("0", str(number))
        Image.new("RGB", (40, 40), color).save(tmp_path / "my-data" / name)
        lines.append(json.dumps(line | {"image": name, "answer": color}))
    (tmp_path / "my-data" / "data.jsonl").write_text("\n".join(lines))
    for command in blocks("commands").splitlines():
        program, *words = shlex.split(command, comments=True)
        assert program == "nvila"
        assert main(words) == 0, capsys.readouterr().err
    assert "registered: models:/nvila-tuned/1" in capsys.readouterr().out
