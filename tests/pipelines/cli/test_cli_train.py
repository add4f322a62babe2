"""`nvila train`: the plan, tiny twins, single stages, and what is refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Nvila = Callable[..., Any]


def test_the_plan_of_a_real_model_needs_no_weights(nvila: Nvila) -> None:
    done = nvila("train", "nvila-8b-video", "--dry-run", "--json")
    assert done.code == 0
    plan = done.last_json
    assert (plan["gpu"], plan["gpus"], plan["precision"]) == ("h100", 128, "bf16")
    stages = {stage["name"]: stage for stage in plan["stages"]}
    assert list(stages) == ["align", "vision", "language", "instruct", "video"]
    # Counts of reference checkpoints: the projector of NVILA-8B, and 26 of 27 blocks and the embeddings of its tower.
    assert stages["align"]["trained"] == {"vision": 0, "projector": 62_425_088, "language": 0}
    assert stages["vision"]["trained"]["vision"] == 413_327_088 - 15_239_504 - 2_304
    assert stages["instruct"]["frozen"] == {"vision": 15_239_504 + 2_304, "projector": 0, "language": 0}
    # 640 x 480 is cut 4 x 3 at the last scale: 3,072 visual tokens, a line feed, and 60 of text.
    assert stages["align"]["positions_per_sample"] == 3072 + 1 + 60
    assert stages["align"]["tiles_per_sample"] == 17
    # 256 frames, eight averaged: 32 runs of 256 tokens and a line feed.
    assert stages["video"]["positions_per_sample"] == 32 * 257 + 200
    assert stages["align"]["steps"] == 1162
    assert plan["gpu_hours"] == pytest.approx(sum(stage["gpu_hours"] for stage in plan["stages"]))
    one = stages["instruct"]["memory"][0]
    assert (one["zero_stage"], one["offload"], one["checkpointing"], one["fits"]) == (0, "none", False, False)
    assert stages["instruct"]["fits"]["zero_stage"] == 3


def test_the_plan_as_tables_says_what_fits(nvila: Nvila) -> None:
    done = nvila("train", "nvila-8b", "--dry-run", "--gpu-memory", "30GiB", "--stage", "align")
    assert done.code == 0
    assert "128 x h100 of 30.0 GiB" in done.out
    assert "align: train.zero_stage=3 train.gradient_checkpointing=true" in done.out
    assert "vision: GiB" not in done.out
    nothing = nvila("train", "nvila-8b", "--dry-run", "--gpu-memory", "10GiB", "--stage", "instruct")
    assert "instruct: nothing fits; use more GPUs" in nothing.out


def test_a_stage_of_unknown_length_has_no_time(nvila: Nvila) -> None:
    done = nvila("train", "nvila-8b", "--dry-run", "--json", "plan.data.align.samples=null")
    stage = done.last_json["stages"][0]
    assert (stage["steps"], stage["seconds"], stage["cost"]) == (None, None, None)
    assert done.last_json["gpu_hours"] is None


def test_faster_gpus_and_fp8_take_less_time(nvila: Nvila) -> None:
    def hours(*words: str) -> float:
        return float(
            nvila("train", "nvila-8b", "--dry-run", "--json", "--stage", "instruct", *words).last_json["gpu_hours"]
        )

    wide = hours()
    assert hours("plan.gpu=a100-80gb") == pytest.approx(wide * 989 / 312)
    assert hours("plan.mfu=0.7") == pytest.approx(wide / 2)
    assert wide / 2 < hours("train.precision=fp8") < wide
    # An A100 has no FP8 units.
    assert hours("plan.gpu=a100-80gb", "train.precision=fp8") == pytest.approx(wide * 989 / 312)


def test_a_twin_is_named_by_its_recipe(nvila: Nvila) -> None:
    assert nvila("train", "nvila-8b", "--tiny", "--dry-run", "--json").last_json["recipe"] == "nvila-8b-tiny"
    assert nvila("train", "nvila-8b-tiny", "--tiny", "--dry-run", "--json").last_json["recipe"] == "nvila-8b-tiny"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nvila-8b"], "train.stages.align.data is not set: recipe nvila-8b leaves the data to you"),
        (["quickstart", "--tiny"], "--tiny: quickstart has no tiny twin"),
        (["--tiny"], "--tiny: no recipe has no tiny twin"),
        (["nvila-8b-tiny", "--stage", "visoin"], "recipe nvila-8b-tiny has no stage 'visoin'"),
        (["nvila-8b-tiny", "--stage", "visoin", "--dry-run"], "recipe nvila-8b-tiny has no stage 'visoin'"),
        (["nvila-8b-tiny", "--gpu-memory", "80GiB"], "--gpu-memory is for --dry-run"),
        (["nvila-8b", "--dry-run", "--gpu-memory", "lots"], "'lots' is no amount of memory"),
        (["nvila-8b", "--dry-run", "plan.gpus=100"], "images_per_step is 512 and cannot be dealt to 100 GPUs"),
        (["nvila-8b", "--dry-run", "plan.data.align.text_tokens=8000"], "makes samples of 11073 positions"),
        (["nvila-8b-tiny", "model.max_length=150"], "model.max_length is 150, too short for one image: up to 193"),
        (
            ["nvila-8b-tiny", "train.stages.vision.max_length=150"],
            "stages.vision.max_length is 150, too short for one image: up to 193 positions in stage vision",
        ),
        (
            ["nvila-8b-tiny", "--stage", "vision"],
            "stage vision starts from stage align, which is not trained",
        ),
        (["nvila-8b-tiny", "model.from={vision: /nowhere, language: /nowhere}"], "which is no folder"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_any_work(nvila: Nvila, words: list[str], message: str) -> None:
    done = nvila("train", *words)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 2  # the problem, and the fix
    assert not list(Path.cwd().glob("nvila-workspace/artifacts/*"))


def test_fp8_of_a_backend_that_is_not_here_is_refused(nvila: Nvila) -> None:
    done = nvila("train", "nvila-8b-tiny", "train.precision=fp8", "train.fp8.backend=transformer_engine")
    assert done.code == 1
    assert "train.fp8.backend=transformer_engine needs that package and a GPU" in done.err
    assert "use train.fp8.backend=auto, torchao or emulated" in done.err


def test_the_command_that_trains_the_stage_before_is_named(nvila: Nvila) -> None:
    done = nvila("train", "nvila-8b-tiny", "--stage", "language")
    assert "fix: nvila train nvila-8b-tiny --stage vision" in done.err


@pytest.mark.parametrize("recipe", ["quickstart", "fast"])
def test_recipes_of_short_rows_have_a_plan_too(nvila: Callable[..., Any], recipe: str) -> None:
    done = nvila("train", recipe, "--dry-run", "--json")
    assert done.code == 0, done.err
    stages = done.last_json["stages"]
    assert [stage["name"] for stage in stages] == ["base", "align", "vision", "language", "instruct"]
    assert all(16 < stage["positions_per_sample"] <= 128 for stage in stages)
