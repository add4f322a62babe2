"""The data step: splits that share no image, a subset on request, the same bytes every time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila.data.dataset import load_samples
from nvila.data.media import ImageTable
from nvila.errors import CapabilityError, ConfigError
from nvila_pipelines.recipe import Recipe
from nvila_platform.artifacts import file_sha256

FILES = {"train.jsonl", "validation.jsonl", "test.jsonl", "captions.jsonl", "text.jsonl", "images.parquet"}


def images_of(directory: Path, split: str) -> set[str]:
    return {key for sample in load_samples(directory, split) for key in sample.images}


def test_it_writes_every_split_and_the_images_of_all(data_dir: Path) -> None:
    assert {path.name for path in data_dir.iterdir()} == FILES
    keys = set(ImageTable.open(data_dir / "images.parquet").keys())
    splits = {split: images_of(data_dir, split) for split in ("train", "validation", "test")}
    assert splits["train"] | splits["validation"] | splits["test"] <= keys
    assert not splits["train"] & splits["validation"]
    assert images_of(data_dir, "captions") <= splits["train"]
    assert not images_of(data_dir, "text")


def test_a_subset_has_that_many_images_of_both_splits(data_dir: Path) -> None:
    keys = set(ImageTable.open(data_dir / "images.parquet").keys())
    assert len(keys) == 80
    assert len(images_of(data_dir, "validation")) == 8
    assert len(images_of(data_dir, "train")) == 32
    assert len(images_of(data_dir, "test")) == 40


def test_without_a_limit_nothing_is_left_out(bench: Any, change: Callable[..., Recipe]) -> None:
    bench.recipe = change("data.max_images=null", "data.validation_images=400")
    metrics, _ = bench.run("data")
    assert metrics["images"] == 5000
    assert metrics["train"] + metrics["validation"] == 38575
    assert metrics["test"] == 9673


def test_a_limit_beyond_a_split_takes_all_of_it(bench: Any, change: Callable[..., Recipe]) -> None:
    bench.recipe = change("data.max_images=2000")
    # Of 4,000 training images and of 1,000 test images.
    assert bench.run("data")[0]["images"] == 3000


def test_the_same_section_gives_the_same_bytes(data_dir: Path, bench: Any) -> None:
    _, again = bench.run("data")
    assert {name: file_sha256(again / name) for name in FILES} == {name: file_sha256(data_dir / name) for name in FILES}


def test_a_subset_must_leave_images_to_train_on(change: Callable[..., Recipe]) -> None:
    with pytest.raises(ConfigError, match=r"data.validation_images is 40, which leaves nothing of max_images 40"):
        change("data.validation_images=40")


def test_the_missing_package_is_named(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "easy_vqa", None)
    with pytest.raises(CapabilityError, match="easy-vqa is not installed"):
        bench.run("data")
