"""The first losses of every tiny recipe, against those that were reviewed.

One thread and a fixed seed make them equal from run to run on one machine; another processor sums in another order, so
they are compared within one percent. `make golden` rewrites them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvila_pipelines.lifecycle import new_run
from nvila_pipelines.recipe import load_recipe
from nvila_pipelines.steps.runner import run_step
from nvila_pipelines.steps.train_process import main
from nvila_platform.settings import Settings
from nvila_platform.store import open_store

# The video twin has every stage; the others are slow together.
TWINS = [
    "nvila-8b-video-tiny",
    *(pytest.param(f"{name}-tiny", marks=pytest.mark.slow) for name in ("nvila-lite-2b", "nvila-lite-8b", "nvila-8b")),
]
STEPS = 3
TOLERANCE = 0.01


def losses(name: str, tmp_path: Path) -> dict[str, list[float]]:
    """Train every stage for some steps, in this process, and return first and last loss of each."""
    plain = load_recipe(name)
    short = [
        f"train.stages.{stage}.{field}"
        for stage in plain.train.stages
        for field in (f"steps={STEPS}", "images_per_step=4")
    ]
    clips = ["data.clips=6"] if plain.data.clips else []
    recipe = load_recipe(name, [*short, *clips, "data.max_images=24", "data.validation_images=4"])
    run = new_run(recipe, Settings.load(tmp_path, {}))
    store = open_store(run.settings)
    data = run_step("data", recipe, {}, run)
    selection = run_step("curate", recipe, {"data": data}, run)
    out = tmp_path / "out"
    spec = tmp_path / "spec.json"
    values = {
        "config": recipe.train_config().to_dict(), "data": str(store.fetch(data)),
        "selection": str(store.fetch(selection)), "out": str(out), "events": str(tmp_path / "events.jsonl"),
    }  # fmt: skip
    spec.write_text(json.dumps(values), encoding="utf-8")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        main(str(spec))
    finally:
        torch.set_num_threads(threads)
    found: dict[str, list[float]] = {}
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        one: dict[str, Any] = json.loads(line)
        found.setdefault(one["stage"], []).append(round(one["loss"], 5))
    return found


@pytest.mark.parametrize("name", TWINS)
def test_losses_are_those_that_were_reviewed(
    name: str, tmp_path: Path, golden: Callable[[str, str], None], request: pytest.FixtureRequest
) -> None:
    found = losses(name, tmp_path)
    assert all(len(values) == 2 for values in found.values())
    file = f"training/{name}.json"
    path = Path(__file__).parents[2] / "golden" / file
    if request.config.getoption("--update-golden"):
        golden(file, json.dumps(found, indent=2) + "\n")
        return
    reviewed = json.loads(path.read_text(encoding="utf-8"))
    assert list(found) == list(reviewed)
    for stage, values in found.items():
        assert values == pytest.approx(reviewed[stage], rel=TOLERANCE), stage
