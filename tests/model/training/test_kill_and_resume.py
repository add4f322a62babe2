"""kill -9 at any point, then the same command: the weights are those of an uninterrupted run, to the bit."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvila.training.config import CheckpointConfig, TrainConfig

Zygote = Any


def slow(*values: Any) -> Any:
    """A row that runs with --slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


FILES = ("model.safetensors", "config.json")


@pytest.fixture(scope="module")
def whole(zygote: Zygote, small_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run that writes no checkpoint."""
    out = tmp_path_factory.mktemp("whole") / "out"
    config = replace(small_config, checkpoints=CheckpointConfig())
    report = zygote.run("whole", config, out)
    assert report.error is None
    assert report.notices == []
    assert not (out / ".checkpoints").exists()
    return out


def finish(zygote: Zygote, config: TrainConfig, out: Path, whole: Path) -> Any:
    """Run to the end and compare with the uninterrupted run."""
    report = zygote.run("finish", config, out)
    assert report.error is None
    for stage in ("1-align", "2-all"):
        for name in FILES:
            assert (out / stage / name).read_bytes() == (whole / stage / name).read_bytes()
    lines = [(one / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for one in (out, whole)]
    assert [line.partition('"tokens_per')[0] for line in lines[0]] == [
        line.partition('"tokens_per')[0] for line in lines[1]
    ]
    assert not list(out.rglob("step-*"))
    return report


@pytest.mark.parametrize(
    ("at", "resumed"),
    [
        slow(("align", 1), [["align", 0, 1], ["all", 0, 1]]),
        slow(("align", 3), [["align", 2, 1], ["all", 0, 1]]),
        slow(("all", 1), [["all", 0, 1]]),
        (("all", 5), [["all", 4, 1]]),
        slow(("all", 7), [["all", 6, 1]]),
    ],
)
def test_kill_after_a_step(
    at: tuple[str, int], resumed: list[Any], zygote: Zygote, small_config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert zygote.run("cut", small_config, out, kill_at=at) == -signal.SIGKILL
    report = finish(zygote, small_config, out, whole)
    assert report.started == resumed


@pytest.mark.slow
def test_kill_twice(zygote: Zygote, small_config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for step in (3, 5):
        assert zygote.run("cut", small_config, out, kill_at=["all", step]) == -signal.SIGKILL
    assert finish(zygote, small_config, out, whole).started == [["all", 4, 1]]


# A checkpoint syncs its own file, the tensors, the state, the manifest, and the folder before and after its renaming.
@pytest.mark.parametrize("sync", [slow(1), slow(2), slow(3), 4, slow(5), slow(6)])
def test_kill_while_the_second_checkpoint_is_written(
    sync: int, zygote: Zygote, small_config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # The stage before writes one checkpoint.
    assert zygote.run("cut", small_config, out, kill_at_sync=6 + 6 + sync) == -signal.SIGKILL
    report = finish(zygote, small_config, out, whole)
    assert report.started == [["all", 2 if sync < 6 else 4, 1]]
    assert not [text for text in report.notices if "damaged" in text]


@pytest.mark.slow
def test_fp8_moments_go_on_to_the_bit(zygote: Zygote, small_config: TrainConfig, tmp_path: Path) -> None:
    config = replace(small_config, optimizer="fp8_adamw", stages=small_config.stages[1:])
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert zygote.run("whole-fp8", config, whole).error is None
    assert zygote.run("cut", config, out, kill_at=["all", 5]) == -signal.SIGKILL
    assert zygote.run("finish", config, out).started == [["all", 4, 1]]
    assert (out / "1-all" / FILES[0]).read_bytes() == (whole / "1-all" / FILES[0]).read_bytes()


@pytest.fixture(scope="module")
def cut(zygote: Zygote, small_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed with two checkpoints on the disk, after steps 4 and 6."""
    out = tmp_path_factory.mktemp("cut") / "out"
    assert zygote.run("cut", small_config, out, kill_at=["all", 7]) == -signal.SIGKILL
    assert [path.name for path in sorted((out / ".checkpoints" / "2-all").iterdir())] == [
        "step-00000004", "step-00000006",
    ]  # fmt: skip
    return out


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state-00001.safetensors", "training.json", "process-00000.json", "manifest.json"])
@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(
    name: str, damage: Any, small_config: TrainConfig, cut: Path, tmp_path: Path
) -> None:
    from nvila.training.checkpoints import Checkpoints

    folder = tmp_path / "2-all"
    shutil.copytree(cut / ".checkpoints" / "2-all", folder)
    damage(folder / "step-00000006" / name)
    notices: list[str] = []
    found = Checkpoints(folder, small_config, small_config.stages[1], notices.append)._newest()
    assert found == "step-00000004"
    assert len(notices) == 1
    assert "damaged-step-00000006" in notices[0]
    assert name in notices[0]
    # What is left for inspection is as it was found.
    assert (folder / "damaged-step-00000006" / "manifest.json").exists() == (
        damage is not Path.unlink or name != "manifest.json"
    )


def test_run_with_a_damaged_checkpoint_ends_in_the_same_weights(
    zygote: Zygote, small_config: TrainConfig, whole: Path, cut: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(cut, out)
    for step in ("step-00000004", "step-00000006"):
        flip(out / ".checkpoints" / "2-all" / step / "state-00001.safetensors")
    report = finish(zygote, small_config, out, whole)
    assert report.started == [["all", 0, 1]]
    assert [text for text in report.notices if "damaged" in text and "the one before" in text]
    # Evidence stays, also behind the end of the stage.
    assert sorted(path.name for path in (out / ".checkpoints" / "2-all").iterdir()) == [
        "damaged-step-00000004", "damaged-step-00000006",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), slow("SIGINT", 130)])
def test_signal_ends_behind_the_step_with_a_checkpoint(
    name: str, code: int, zygote: Zygote, small_config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    config, out = replace(small_config, checkpoints=CheckpointConfig()), tmp_path / "out"
    # The sixth step is the third of the second stage.
    report = zygote.run("stopped", config, out, signal_in=[6, name])
    assert report.error[0] == code
    if code == 75:
        assert "stopped by SIGTERM after step 3 of stage all" in report.error[1]
    assert report.steps[-1][:2] == ["all", 3]
    assert finish(zygote, config, out, whole).started == [["all", 3, 1]]


@pytest.mark.slow
def test_signal_in_the_last_step_of_a_stage_ends_behind_the_stage(
    zygote: Zygote, small_config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = zygote.run("stopped", small_config, out, signal_in=[3, "SIGTERM"])
    assert report.error[0] == 75
    assert "after stage align" in report.error[1]
    assert [path.name for path in out.glob("*-*")] == ["1-align"]
    assert finish(zygote, small_config, out, whole).started == [["all", 0, 1]]


@pytest.mark.slow
def test_signal_in_the_last_step_of_all_changes_nothing(
    zygote: Zygote, small_config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    report = zygote.run("stopped", small_config, tmp_path / "out", signal_in=[10, "SIGTERM"])
    assert report.error is None
    assert (tmp_path / "out/2-all" / FILES[0]).read_bytes() == (whole / "2-all" / FILES[0]).read_bytes()


def test_checkpoint_of_other_settings_is_refused(
    zygote: Zygote, small_config: TrainConfig, cut: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(cut, out)
    changed = replace(small_config, stages=(small_config.stages[0], replace(small_config.stages[1], steps=8)))
    report = zygote.run("other", changed, out)
    assert report.error[0] == 2
    assert "written with stages.all.steps=7, it is 8 now" in report.error[1]


def test_checkpoint_that_cannot_be_written_costs_nothing_else(
    zygote: Zygote, small_config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # Room for the model, not for its moments beside it; the checkpoint behind the second step was written before.
    size = (whole / "2-all" / FILES[0]).stat().st_size
    report = zygote.run("full", small_config, out, limit_at=["all", 3, 2 * size], kill_at=["all", 7])
    assert report == -signal.SIGKILL
    left = [path.name for path in (out / ".checkpoints" / "2-all").iterdir()]
    assert left == ["step-00000002"]
    report = zygote.run("full", small_config, out, limit_at=["all", 3, 2 * size])
    assert report.error is None
    told = [text for text in report.notices if "no checkpoint was saved" in text]
    assert [text[:16] for text in told] == ["stage all step 4", "stage all step 6"]
    assert "(File too large); training goes on" in told[0]
    assert (out / "2-all" / FILES[0]).read_bytes() == (whole / "2-all" / FILES[0]).read_bytes()


@pytest.mark.slow
def test_model_that_cannot_be_written_ends_the_run_loudly(
    zygote: Zygote, small_config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = zygote.run("full", small_config, out, limit_at=["align", 3, 100_000])
    assert report.error[0] == 1
    assert "the model of a finished stage cannot be written to" in report.error[1]
    assert "1-align" in report.error[1]
    assert not list(out.glob("*-*"))
    # What was saved before is still there to go on from.
    assert finish(zygote, small_config, out, whole).started == [["align", 2, 1], ["all", 0, 1]]
