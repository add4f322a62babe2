"""The examples and the code of docs/model.md run as they stand."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_tour_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "model_tour.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line[:2] for line in lines if line[:1].isdigit()] == ["1.", "2.", "3.", "4.", "5."]
    # 4x4 tokens of a tile; the last scale of a 16:10 image has 12 tiles.
    assert "tiles 1x1 + 2x2 + 4x3, 192 visual tokens" in lines[0]
    # 16 frames in 2 groups of 16 tokens.
    assert "32 visual tokens" in lines[2]


def test_code_of_the_model_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"docs/model.md, block {number}", "exec"), names)  # noqa: S102  # our own page
