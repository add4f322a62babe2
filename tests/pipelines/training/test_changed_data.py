"""Data that stages read from where they lie are part of the key of training: changed files are other data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nvila.errors import ConfigError, DataError
from nvila_pipelines.recipe import Recipe, load_recipe
from nvila_pipelines.steps.runner import step_key
from nvila_pipelines.steps.table import STEPS
from nvila_pipelines.training.outside import data_digests
from nvila_platform.store import ArtifactRef

if TYPE_CHECKING:
    from tests.conftest import S3Service

LINE = '{"id": "1", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}\n'


def recipe_of(expression: str, *more: str) -> Recipe:
    stage = f"{{images_per_step: null, batch_tokens: 2000, steps: 2, epochs: null, data: '{expression}'}}"
    return load_recipe("nvila-lite-8b-tiny", [f"train.stages.align={stage}", *more])


def key(recipe: Recipe) -> str:
    inputs = {
        name: ArtifactRef(step=step, key="a" * 64, digest="b" * 64, uri="file:///x")
        for name, step in STEPS["train"].inputs.items()
    }
    return step_key(STEPS["train"], recipe, inputs)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    here = tmp_path / "sets"
    here.mkdir()
    for name in ("a", "b"):
        (here / f"{name}.jsonl").write_text(LINE, encoding="utf-8")
    (here / "keep").mkdir()
    (here / "keep" / "a.json").write_text("{}", encoding="utf-8")
    (tmp_path / "sets.yaml").write_text("first: {path: sets/a.jsonl}\nboth: first + sets/b.jsonl*2\n", encoding="utf-8")
    return here


def grown(file: Path) -> None:
    file.write_text(LINE * 2, encoding="utf-8")


def of_the_same_size(file: Path) -> None:
    file.write_text(LINE.replace("yo", "no"), encoding="utf-8")
    os.utime(file, ns=(1, 1))


@pytest.mark.parametrize("change", [grown, of_the_same_size])
def test_changed_data_have_another_key(change: Callable[[Path], None], folder: Path) -> None:
    recipe = recipe_of(str(folder / "a.jsonl"))
    before = key(recipe)
    assert key(recipe) == before
    change(folder / "b.jsonl")
    assert key(recipe) == before
    change(folder / "a.jsonl")
    assert key(recipe) != before


def test_files_that_join_a_folder_or_a_mixture_of_a_registry_count(folder: Path) -> None:
    whole = recipe_of(str(folder))
    named = load_recipe(
        "nvila-lite-8b-tiny",
        [
            *(f"train.stages.{name}.data=both" for name in ("align", "vision", "language", "instruct")),
            "data.dataset=null", f"data.registry={folder.parent / 'sets.yaml'}",
        ],
    )  # fmt: skip
    before = {recipe.name + str(n): key(recipe) for n, recipe in enumerate((whole, named))}
    (folder / "c.jsonl").write_text(LINE, encoding="utf-8")
    assert key(whole) != before["nvila-lite-8b-tiny0"]
    assert key(named) == before["nvila-lite-8b-tiny1"]
    grown(folder / "b.jsonl")
    assert key(named) != before["nvila-lite-8b-tiny1"]
    assert list(data_digests(named)) == ["both"]


def test_data_of_the_run_and_built_in_ones_are_known_by_name(folder: Path) -> None:
    assert data_digests(load_recipe("nvila-lite-8b-tiny")) == {}
    assert list(data_digests(recipe_of("easy-vqa"))) == ["easy-vqa"]
    assert data_digests(recipe_of("easy-vqa")) == data_digests(recipe_of("easy-vqa"))


def test_data_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        key(recipe_of(str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(ConfigError, match="there is no data set 'easy-vqx'"):
        key(recipe_of("easy-vqx"))


def test_changed_objects_have_another_key(s3: S3Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.variables.items():
        monkeypatch.setenv(name, value)
    prefix = f"changed/{tmp_path.name}"
    s3.put(f"{prefix}/a.jsonl", LINE.encode())
    recipe = recipe_of(f"s3://models/{prefix}/a.jsonl")
    before = key(recipe)
    assert key(recipe) == before
    s3.put(f"{prefix}/a.jsonl", LINE.replace("yo", "no").encode())
    assert key(recipe) != before
