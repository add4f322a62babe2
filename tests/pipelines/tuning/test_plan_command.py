"""`nvila plan` as a user runs it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.pipelines.conftest import Nvila


@pytest.mark.slow
def test_plan_compares_methods_and_picks_one_without_weights(nvila: Nvila, base: Path, pictures: Path) -> None:
    copy = Path("without weights")
    shutil.copytree(base, copy)
    (copy / "model.safetensors").write_bytes(b"never read")
    done = nvila("plan", copy, pictures, "--memory", "24GiB", "--rank", 4, "--json")
    assert done.code == 0, done.err
    plan = done.last_json
    peaks = {option["method"]: option["peak"] for option in plan["options"]}
    assert len(peaks) == 8
    assert peaks["ln+full+qlora"] < peaks["ln+full+lora"]
    assert plan["picked"]["method"] == "ln+full+lora"
    assert plan["available"] == 24 * 2**30


def test_a_plan_that_cannot_fit_says_what_is_missing(nvila: Nvila, base: Path, pictures: Path) -> None:
    done = nvila("plan", base, pictures, "--memory", "1KiB", "--method", "ln+qlora")
    assert done.code == 1
    assert "nothing fits into" in done.err
    assert "MiB too much" in done.out
    tune = nvila("tune", base, pictures, "--memory", "1KiB")
    assert tune.code == 1
    assert "even with the smallest batches" in tune.err
    assert not Path("nvila-workspace/artifacts/tune").exists()


@pytest.mark.slow
def test_tuning_logs_the_measured_peak_beside_the_plan(nvila: Nvila, base: Path, pictures: Path) -> None:
    done = nvila("tune", base, pictures, "--steps", 3, "--rank", 4, "--no-register", "--json")
    memory = done.last_json["memory"]
    assert abs(memory["error"]) < 0.15
    assert "bytes measured" in done.err
