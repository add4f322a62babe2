"""The task of docs/evaluation.md is run as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.evaluation.registry import task_files
from nvila.evaluation.scorers.table import SCORERS

if TYPE_CHECKING:
    from tests.pipelines.conftest import Nvila

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def block(language: str, holding: str) -> str:
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return next(text for text in found if holding in text)


def test_a_task_of_twenty_lines_runs(nvila: Nvila, model_folder: Path, tmp_path: Path) -> None:
    from nvila.evaluation.fixtures import picture

    task, rows = block("yaml", "scorer:"), block("json", "receipt")
    command = block("bash", "receipts.yaml")
    assert len((task + rows + command).splitlines()) <= 20
    (tmp_path / "receipts.yaml").write_text(task)
    (tmp_path / "receipts").mkdir()
    (tmp_path / "receipts" / "rows.jsonl").write_text(rows)
    for name in re.findall(r'"photo": "([^"]+)"', rows):
        (tmp_path / "receipts" / name).write_bytes(picture("42.00"))
    words = shlex.split(command)
    assert words[:3] == ["nvila", "evaluate", "MODEL"]
    done = nvila("evaluate", model_folder, *words[3:], "--threads", "1")
    assert done.code == 0, done.err
    assert any(line.startswith("receipts") and "anls" in line for line in done.out.splitlines())


def test_the_page_names_all_tasks_and_scorers() -> None:
    named = set(re.findall(r"`([^`\n]+)`", PAGE))
    assert set(task_files()) <= named
    assert set(SCORERS) <= named
