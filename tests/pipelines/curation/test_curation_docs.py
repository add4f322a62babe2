"""docs/curation.md followed to the letter, in a folder that holds what it speaks of."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila_pipelines.cli import main

PAGE = Path(__file__).resolve().parents[3] / "docs" / "curation.md"
Curate = Callable[..., int]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_works_as_it_stands(
    curate: Curate, models: dict[str, Path], llava: Any, capsys: Any, tmp_path: Path
) -> None:
    shutil.copytree(llava(24).parent, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "llava.jsonl").read_text(encoding="utf-8").replace('"shapes"', '"chart"')
    (tmp_path / "llava.jsonl").write_text(text, encoding="utf-8")
    shutil.copytree(models["small"], tmp_path / "models" / "lite-2b")
    shutil.copytree(models["large"], tmp_path / "models" / "lite-15b")
    first, again, cluster = blocks("bash")
    assert len(commands(first)) == 1, "one command curates a folder"
    for program, *words in [*commands(first), *commands(again)]:
        assert (program, main(words)) == ("nvila", 0), words
    (training,) = blocks("python")
    names: dict[str, Any] = {}
    exec(training, names)  # noqa: S102 - our own page
    assert names["stream"].count() == 12
    (job,) = commands(cluster)
    capsys.readouterr()
    assert job[-1] == "--submit"
    assert main([*job[1:-1], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "TrainJob"
