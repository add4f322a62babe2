"""Stages trained one at a time: they end in what an uninterrupted run ends in."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvila.errors import ConfigError
from nvila_pipelines.lifecycle import new_run
from nvila_pipelines.recipe import Recipe, load_recipe
from nvila_pipelines.steps.runner import run_step
from nvila_pipelines.training.stages import adopt_stages, check_predecessor
from nvila_platform.artifacts import file_sha256
from nvila_platform.settings import Settings
from nvila_platform.store import open_store

SHORT = [
    "data.max_images=24", "data.validation_images=4", "train.num_threads=1", "train.stages.language=null",
    "train.stages.instruct=null", "train.stages.align.steps=2", "train.stages.vision.steps=2",
]  # fmt: skip


class Notices:
    """A reporter that keeps notices."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def progress(self, *_: object, **__: object) -> None:
        """Nothing to keep."""

    def notice(self, text: str) -> None:
        self.texts.append(text)


def train(recipe: Recipe, settings: Settings) -> tuple[Path, list[str]]:
    """Do what `run_until` does, without tracking."""
    run, notices = new_run(recipe, settings), Notices()
    data = run_step("data", recipe, {}, run)
    inputs = {"data": data, "selection": run_step("curate", recipe, {"data": data}, run)}
    adopt_stages(recipe, inputs, settings, notices)
    return open_store(settings).fetch(run_step("train", recipe, inputs, run)), notices.texts


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_stage_at_a_time_ends_in_the_same_weights(tmp_path: Path) -> None:
    recipe = load_recipe("nvila-lite-8b-tiny", SHORT)
    apart, together = (Settings.load(tmp_path / name, {}) for name in ("apart", "together"))
    with pytest.raises(ConfigError, match="starts from stage align, which is not trained"):
        check_predecessor(recipe, "vision", apart)
    first, _ = train(recipe.up_to("align"), apart)
    check_predecessor(recipe, "vision", apart)
    second, notices = train(recipe.up_to("vision"), apart)
    assert notices == ["taken over from a shorter run: align"]
    whole, _ = train(recipe, together)
    for stage in ("1-align", "2-vision", "model"):
        assert file_sha256(second / stage / "model.safetensors") == file_sha256(whole / stage / "model.safetensors")
    assert file_sha256(second / "1-align" / "model.safetensors") == file_sha256(first / "model" / "model.safetensors")
    assert (second / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
