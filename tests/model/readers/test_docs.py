"""The examples of docs/data.md are read as they stand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nvila.data.builtin import BUILTINS, open_builtin
from nvila.data.mixtures import Registry
from nvila.data.readers.formats import FORMATS
from nvila.data.readers.parsing import KNOWN_FIELDS

if TYPE_CHECKING:
    from tests.model.readers.conftest import ReadPath, WriteTar

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, write_tar: WriteTar, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page speaks of: charts.jsonl, images, shards and mixtures.yaml."""
    (tmp_path / "images").mkdir()
    (tmp_path / "charts.jsonl").write_text("".join(blocks("json")))
    write_tar([("0001.jpg", b"1"), ("0001.txt", b"a cat")], "shards/0.tar")
    (tmp_path / "mixtures.yaml").write_text(blocks("yaml")[0])
    (tmp_path / "half").mkdir()
    for name, ignored in (("charts", [0, 1, 2, 3]), ("docs", [])):
        (tmp_path / "half" / f"{name}.json").write_text(json.dumps(ignored))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_example_record_can_be_used(folder: Path, read_path: ReadPath) -> None:
    records = read_path(folder / "charts.jsonl", media_dir="images")
    assert [record.problem for record in records] == [None] * 9
    assert [record.sample.id for record in records if record.sample] == [str(number) for number in range(1, 10)]


def test_the_code_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for number, block in enumerate(blocks("python"), start=1):
        exec(compile(block, f"docs/data.md, block {number}", "exec"), names)  # noqa: S102  # our own page
    assert "vqa 8 What is this? cat\n" in capsys.readouterr().out


def test_the_registry_means_what_its_comments_say(folder: Path) -> None:
    registry = Registry.load("mixtures.yaml")
    assert registry.open("both").count() == 9 + 3
    assert registry.open("small").count() == 5 + 3
    [record] = registry.open("docs").records()
    assert record.sample is not None
    assert record.sample.source == "documents"


def test_the_tables_name_everything() -> None:
    named = set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL)))
    assert set(KNOWN_FIELDS) <= named
    assert set(FORMATS) <= named
    assert {suffix for format in FORMATS.values() for suffix in format.suffixes if ".gz" not in suffix} <= named


@pytest.mark.parametrize("name", BUILTINS)
def test_the_sizes_of_built_in_data_sets_are_true(name: str) -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name.partition(':')[0]}`"))
    assert f"{open_builtin(name).count():,}" in row.split("|")[3]
