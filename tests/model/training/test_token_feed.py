"""Stages with a token budget, through the whole training run: data in memory and in folders, resumed, damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

from nvila.data.media import ImageTable
from nvila.data.records import Sample, vqa_sample
from nvila.errors import ConfigError, DataError
from nvila.training.config import CheckpointConfig, ModelConfig, StageConfig, TrainConfig
from nvila.training.run import train

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerFast

Run = Callable[..., Path]


class Killed(BaseException):
    """Ends a run as a signal would: nothing catches it."""


class Recorder:
    """Remembers notices; ends the run at a step."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.notices: list[str] = []
        self._kill_at = kill_at

    def progress(self, phase: str, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        if phase == "mix" and done == self._kill_at:
            raise Killed

    def notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.fixture
def folder(pictures: dict[str, Image.Image], tmp_path: Path) -> Path:
    """Pictures and texts in LLaVA form."""
    directory = tmp_path / "data"
    directory.mkdir()
    lines = []
    for number, (name, picture) in enumerate(pictures.items()):
        picture.save(directory / f"{name}.png")
        turns = [{"from": "human", "value": "<image>what color?"}, {"from": "gpt", "value": "red one two"}]
        lines.append({"id": name, "image": f"{name}.png", "conversations": turns})
        turns = [{"from": "human", "value": "what shape?"}, {"from": "gpt", "value": "circle " * (1 + number)}]
        lines.append({"id": f"text-{name}", "conversations": turns})
    (directory / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return directory


@pytest.fixture
def samples() -> list[Sample]:
    return [
        vqa_sample(id=f"{image}-{question}", source="s", image=image, question=question, answer=answer)
        for image in "abcd"
        for question, answer in (("what color?", "red"), ("what shape?", "circle"), ("is there a circle?", "yes"))
    ]


@pytest.fixture
def run(
    model_config: ModelConfig, samples: list[Sample], image_table: ImageTable, tokenizer: PreTrainedTokenizerFast
) -> Run:
    def run_(out_dir: Path, data: str, reporter: Recorder | None = None, **changes: Any) -> Path:
        values: dict[str, Any] = {
            "name": "mix", "data": data, "steps": 5, "lr": {"projector": 1e-2, "language": 1e-2}, "warmup_steps": 1,
            "schedule": "cosine", "max_shift_pixels": 1, "batch_tokens": 200, "micro_batch_tokens": 130, "pack": True,
        }  # fmt: skip
        stage = StageConfig(**(values | changes))
        config = TrainConfig(
            model=model_config, stages=(stage,), backend="torch", seed=5, checkpoints=CheckpointConfig(every_steps=1)
        )
        return train(config, {"questions": samples}, image_table, tokenizer, out_dir, reporter or Recorder())

    return run_


def losses(out_dir: Path) -> list[float]:
    lines = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("pack", [True, False])
def test_a_folder_trains_a_stage(run: Run, folder: Path, tmp_path: Path, pack: bool) -> None:
    model = run(tmp_path / "out", str(folder), pack=pack, steps=12)
    found = losses(tmp_path / "out")
    assert found[-1] < 0.5 * found[0]
    assert (model / "model.safetensors").is_file()
    # The index is scratch; nothing was set aside.
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")) == [
        "1-mix",
        "metrics.jsonl",
    ]


@pytest.mark.parametrize("samples_per_image", [1, 3])
def test_data_in_memory_trains_by_tokens_too(run: Run, tmp_path: Path, samples_per_image: int) -> None:
    run(tmp_path, "questions", samples_per_image=samples_per_image, pack=False, steps=8)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


@pytest.mark.parametrize("kill_at", [1, 4])
def test_a_killed_stage_goes_on_to_the_same_weights(run: Run, folder: Path, tmp_path: Path, kill_at: int) -> None:
    whole = run(tmp_path / "whole", f"{folder} + {folder}")
    with pytest.raises(Killed):
        run(tmp_path / "cut", f"{folder} + {folder}", Recorder(kill_at))
    cut = run(tmp_path / "cut", f"{folder} + {folder}")
    expected, found = (load_file(path / "model.safetensors") for path in (whole, cut))
    assert all(expected[name].equal(found[name]) for name in expected)


def test_what_cannot_be_used_is_left_beside_the_model(run: Run, folder: Path, tmp_path: Path) -> None:
    (folder / "b.png").write_bytes(b"no picture")
    with (folder / "data.jsonl").open("a", encoding="utf-8") as out:
        out.write("{}\n")
    recorder = Recorder()
    run(tmp_path / "out", str(folder), recorder, max_bad=0.2)
    lines = (tmp_path / "out" / "quarantine" / "mix.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == [None, "b"]
    assert any("1 of 17 samples" in notice for notice in recorder.notices)
    with pytest.raises(DataError, match=r"2 of 17 samples .* more than the 10\.0% of max_bad"):
        run(tmp_path / "strict", str(folder), max_bad=0.1)


def test_data_that_are_not_there_are_refused_before_anything_runs(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no data set 'easy-vqx'.*easy-vqa"):
        run(tmp_path / "out", "easy-vqx")
    without = {"batch_tokens": None, "micro_batch_tokens": None, "pack": False, "images_per_step": 2}
    with pytest.raises(ConfigError, match=r"stages.mix.data is 'question'.*questions.*with batch_tokens"):
        run(tmp_path / "out", "question", **without)
    assert not (tmp_path / "out").exists()


def test_a_stage_has_a_length_limit_of_its_own(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_length is 5, but one image alone takes 5 positions"):
        run(tmp_path, "questions", max_length=5)


def test_without_a_size_of_forward_passes_a_process_takes_its_share_at_once(run: Run, tmp_path: Path) -> None:
    run(tmp_path, "questions", micro_batch_tokens=None, steps=2)
    with pytest.raises(ConfigError, match=r"micro_batch_tokens is 20, but"):
        run(tmp_path / "small", "questions", micro_batch_tokens=20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_per_step": 2}, "has both images_per_step and batch_tokens"),
        ({"batch_tokens": None}, "has neither images_per_step and batch_tokens|neither images_per_step nor"),
        ({"batch_tokens": None, "images_per_step": 2}, "micro_batch_tokens needs batch_tokens"),
        ({"batch_tokens": None, "images_per_step": 2, "micro_batch_tokens": None}, "pack needs batch_tokens"),
    ],
)
def test_sizes_of_batches_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    stage = StageConfig(
        name="s", data="d", steps=2, lr={"language": 1e-3}, warmup_steps=0, schedule="linear",
        batch_tokens=100, micro_batch_tokens=50, pack=True,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        replace(stage, **changes)
