"""Stages trained one at a time: they end in what an uninterrupted run ends in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nvila.errors import ConfigError
from nvila_pipelines.lifecycle import run_until
from nvila_pipelines.recipe import Recipe, load_recipe
from nvila_pipelines.training.stages import check_predecessor
from nvila_platform.artifacts import file_sha256
from nvila_platform.settings import Settings
from nvila_platform.store import open_store
from nvila_platform.telemetry import ProgressView

SHORT = [
    "data.max_images=24", "data.validation_images=4", "train.num_threads=1", "train.stages.language=null",
    "train.stages.instruct=null", "train.stages.align.steps=2", "train.stages.vision.steps=2",
]  # fmt: skip


class Told(ProgressView):
    """Keeps the notices of a run."""

    def __init__(self) -> None:
        super().__init__(format="json")
        self.notices: list[str] = []

    def show(self, event: Any) -> None:
        if event.notice:
            self.notices.append(event.notice)


def train(recipe: Recipe, settings: Settings) -> tuple[Path, list[str]]:
    view = Told()
    with view:
        ref = run_until(recipe, settings, "train", view=view)
    return open_store(settings).fetch(ref), view.notices


@pytest.mark.slow
def test_one_stage_at_a_time_ends_in_the_same_weights(tmp_path: Path) -> None:
    recipe = load_recipe("nvila-lite-8b-tiny", SHORT)
    apart, together = (Settings.load(tmp_path / name, {}) for name in ("apart", "together"))
    with pytest.raises(ConfigError, match="starts from stage align, which is not trained"):
        check_predecessor(recipe, "vision", apart)
    first, _ = train(recipe.up_to("align"), apart)
    check_predecessor(recipe, "vision", apart)
    second, notices = train(recipe.up_to("vision"), apart)
    assert "taken over from a shorter run: align" in notices
    assert not any("went" in notice for notice in notices)
    whole, _ = train(recipe, together)
    for stage in ("1-align", "2-vision", "model"):
        assert file_sha256(second / stage / "model.safetensors") == file_sha256(whole / stage / "model.safetensors")
    assert file_sha256(second / "1-align" / "model.safetensors") == file_sha256(first / "model" / "model.safetensors")
    assert (second / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
