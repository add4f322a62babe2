from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nvila.assembly import build_model, load_model
from nvila.data.collation import Batch
from nvila.data.media import ImageTable, write_image_table
from nvila.data.packing import FlatBatch, flatten
from nvila.data.records import Sample, vqa_sample, write_jsonl
from nvila.errors import ConfigError, DataError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.training.config import Fp8Config, ModelConfig, PrecisionConfig, StageConfig, TrainConfig
from nvila.training.run import train, trained_parts

TOWER = "model.vision_tower"
PREFIXES = {
    # The third block comes behind the selected layer.
    "vision": (f"{TOWER}.embeddings", f"{TOWER}.encoder.layers.0", f"{TOWER}.encoder.layers.1"),
    "projector": ("model.mm_projector",),
    "language": ("model.language_model",),
}
PROCESS = """
import json, sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from nvila.data.dataset import load_samples
from nvila.data.media import ImageTable
from nvila.training.config import TrainConfig
from nvila.training.run import train

torch.set_num_threads(1)
here = Path(sys.argv[1])
config = TrainConfig.from_dict(json.loads((here / "config.json").read_text()))
data = {"questions": load_samples(here, "questions")}
words = AutoTokenizer.from_pretrained(here / "words")
train(config, data, ImageTable.open(here / "images.parquet"), words, here / "out")
"""


class Killed(BaseException):
    """Ends a run as a signal would: nothing catches it."""


class Recorder:
    """Remembers notices and ends the run at a given step of a given stage."""

    def __init__(self, kill_at: tuple[str, int] | None = None) -> None:
        self.notices: list[str] = []
        self.steps: list[tuple[str, int]] = []
        self._kill_at = kill_at

    def progress(self, phase: str, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        self.steps.append((phase, done))
        if (phase, done) == self._kill_at:
            raise Killed

    def notice(self, text: str) -> None:
        self.notices.append(text)


def stage(name: str, **changes: Any) -> StageConfig:
    values: dict[str, Any] = {
        "name": name, "data": "questions", "steps": 3, "lr": {"projector": 1e-2}, "images_per_step": 2,
        "samples_per_image": 2, "warmup_steps": 1, "schedule": "cosine", "max_shift_pixels": 1,
    }  # fmt: skip
    return StageConfig(**(values | changes))


@pytest.fixture
def config(model_config: ModelConfig) -> TrainConfig:
    stages = (
        stage("align"),
        stage("vision", lr={"vision": 1e-2}),
        stage("language", lr={"language": 1e-2}, data="captions"),
    )
    return TrainConfig(model=model_config, stages=stages, backend="torch", seed=5)


@pytest.fixture(scope="module")
def datasets() -> dict[str, Sequence[Sample]]:
    def sample(image: str, question: str, answer: str) -> Sample:
        return vqa_sample(id=f"{image}-{question}", source="s", image=image, question=question, answer=answer)

    return {
        "questions": [
            sample(image, question, answer)
            for image in "abcde"
            for question, answer in (("what color?", "red"), ("what shape?", "circle"), ("is there a circle?", "yes"))
        ],
        "captions": [sample(image, "describe the image.", "the red circle") for image in "abc"],
        "text": [
            vqa_sample(id=str(n), source="text", image=None, question="what color?", answer=answer)
            for n, answer in enumerate(("red", "blue", "green"))
        ],
    }


@pytest.fixture
def run_train(
    datasets: dict[str, Sequence[Sample]], image_table: ImageTable, tokenizer: PreTrainedTokenizerFast
) -> Any:
    def run(config: TrainConfig, out_dir: Path, reporter: Recorder | None = None) -> Path:
        return train(config, datasets, image_table, tokenizer, out_dir, reporter or Recorder())

    return run


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def changed_between(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> set[str]:
    return {name for name in second if not torch.equal(first[name], second[name])}


def metrics(out_dir: Path) -> list[tuple[str, int, float]]:
    lines = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(line["stage"], line["step"], line["loss"]) for line in map(json.loads, lines)]


def test_each_stage_changes_its_parts_and_only_those(
    run_train: Any, config: TrainConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    final = run_train(config, tmp_path)
    names = ["1-align", "2-vision", "3-language"]
    assert final == tmp_path / names[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "metrics.jsonl"]
    torch.manual_seed(config.seed)
    before: Mapping[str, Tensor] = build_model(config.model, tokenizer).state_dict()
    for name, part in zip(names, ("projector", "vision", "language"), strict=True):
        after = weights(tmp_path / name)
        assert changed_between(before, after) == {key for key in after if key.startswith(PREFIXES[part])}
        before = after
    model, _ = load_model(final)
    assert model.config.num_image_tokens == 4


def test_sdpa_joins_the_rows_of_single_samples_and_trains_as_eager_does(
    run_train: Any, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[int] = []

    def spy(batch: Batch) -> FlatBatch:
        joined.append(batch.num_samples)
        return flatten(batch)

    monkeypatch.setattr("nvila.training.loop.flatten", spy)
    changes = {"lr": {"language": 1e-3}, "max_shift_pixels": 0}
    apart, shared = (stage("all", samples_per_image=number, **changes) for number in (1, 2))
    losses = {}
    for attention in ("sdpa", "eager"):
        run_train(replace(config, stages=(apart,), attention=attention), tmp_path / attention)
        losses[attention] = [loss for _, _, loss in metrics(tmp_path / attention)]
        assert joined == [2, 2, 2], attention  # by sdpa alone
    assert losses["sdpa"] == pytest.approx(losses["eager"], rel=1e-4)
    run_train(replace(config, stages=(shared,)), tmp_path / "shared")
    assert joined == [2, 2, 2], "samples that share their beginning need a mask of pairs"


@pytest.mark.parametrize("kill_at", [("align", 2), ("vision", 3), ("language", 1)])
def test_killed_run_ends_in_the_weights_of_an_uninterrupted_one(
    kill_at: tuple[str, int], run_train: Any, config: TrainConfig, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for directory in (whole, cut):
        directory.mkdir()
    run_train(config, whole)
    with pytest.raises(Killed):
        run_train(config, cut, Recorder(kill_at))
    # A kill while a stage is written leaves a folder under another name.
    partial = cut / f".{[s.name for s in config.stages].index(kill_at[0]) + 1}-{kill_at[0]}.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    second = Recorder()
    run_train(config, cut, second)
    done = [s.name for s in config.stages][: [s.name for s in config.stages].index(kill_at[0])]
    assert second.notices == [f"stage {name} is already trained; going on from it" for name in done]
    assert not {phase for phase, _ in second.steps} & set(done)
    for path in sorted(whole.glob("*-*")):
        files = [file.name for file in path.iterdir()]
        assert all((cut / path.name / name).read_bytes() == (path / name).read_bytes() for name in files)
    assert not partial.exists()
    assert metrics(cut) == metrics(whole)


def test_finished_run_is_not_repeated(run_train: Any, config: TrainConfig, tmp_path: Path) -> None:
    first = run_train(config, tmp_path)
    again = Recorder()
    assert run_train(config, tmp_path, again) == first
    assert again.steps == []
    assert len(again.notices) == 3


def test_the_seed_decides_everything(run_train: Any, config: TrainConfig, tmp_path: Path) -> None:
    one = replace(config, stages=config.stages[:1])
    states = []
    for number, seed in enumerate((5, 5, 6)):
        (tmp_path / str(number)).mkdir()
        states.append(weights(run_train(replace(one, seed=seed), tmp_path / str(number))))
    assert not changed_between(states[0], states[1])
    assert changed_between(states[0], states[2])


@pytest.mark.usefixtures("one_process")
def test_deepspeed_trains_the_same_stages(run_train: Any, config: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is an extra")
    found = {}
    for backend in ("torch", "deepspeed"):
        (tmp_path / backend).mkdir()
        found[backend] = weights(run_train(replace(config, backend=backend), tmp_path / backend))
    for name, tensor in found["torch"].items():
        if name.endswith("k_proj.bias"):  # its gradient in the tower is zero but for rounding, which Adam normalises
            continue
        # As a whole: Adam makes a step of every gradient, also of one that is rounding error alone.
        assert float((found["deepspeed"][name] - tensor).norm()) < 1e-3 * float(tensor.norm()) + 5e-3, name


@pytest.mark.slow
def test_two_processes_train_what_one_does(
    run_train: Any,
    config: TrainConfig,
    datasets: dict[str, Sequence[Sample]],
    image_table: ImageTable,
    tokenizer: PreTrainedTokenizerFast,
    free_port: int,
    tmp_path: Path,
) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is an extra")
    everything = stage("all", lr={"vision": 1e-2, "projector": 1e-2, "language": 1e-2}, max_shift_pixels=0)
    config = replace(config, stages=(everything,), backend="deepspeed")
    write_jsonl(tmp_path / "questions.jsonl", datasets["questions"])
    write_image_table(tmp_path / "images.parquet", ((key, image_table.encoded(key)) for key in "abcde"))
    tokenizer.save_pretrained(tmp_path / "words")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    processes = []
    for rank in ("0", "1"):
        launched = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
        launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
        processes.append(subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path)], env=os.environ | launched))
    try:
        assert [process.wait(150) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    alone = weights(run_train(replace(config, backend="torch"), tmp_path / "alone"))
    together = weights(tmp_path / "out" / "1-all")
    assert [step for _, step, _ in metrics(tmp_path / "out")] == [step for _, step, _ in metrics(tmp_path / "alone")]
    for name, tensor in alone.items():
        if name.endswith("k_proj.bias"):  # as above
            continue
        assert float((together[name] - tensor).norm()) < 1e-3 * float(tensor.norm()) + 5e-3, name


def test_fp8_trains_other_weights_of_the_same_names(run_train: Any, config: TrainConfig, tmp_path: Path) -> None:
    found = {}
    for name in ("fp32", "fp8"):
        (tmp_path / name).mkdir()
        precision = PrecisionConfig(name=name, fp8=Fp8Config(min_features=32))
        reporter = Recorder()
        found[name] = weights(run_train(replace(config, precision=precision), tmp_path / name, reporter))
        assert reporter.notices == []
    assert found["fp32"].keys() == found["fp8"].keys()
    assert changed_between(found["fp32"], found["fp8"])
    assert not any(tensor.isnan().any() for tensor in found["fp8"].values())


def test_fp8_that_converts_nothing_says_so(run_train: Any, config: TrainConfig, tmp_path: Path) -> None:
    reporter = Recorder()
    one = replace(config, stages=config.stages[:1], precision=PrecisionConfig(name="fp8"))
    run_train(one, tmp_path, reporter)
    assert len(reporter.notices) == 1
    assert "fp8.min_features" in reporter.notices[0]


def test_stage_of_text_alone_trains_the_language_model(run_train: Any, config: TrainConfig, tmp_path: Path) -> None:
    one = replace(config, stages=(stage("words", data="text", lr={"language": 1e-2}),))
    final = weights(run_train(one, tmp_path))
    assert not any(tensor.isnan().any() for tensor in final.values())


def test_output_folder_is_made(run_train: Any, config: TrainConfig, tmp_path: Path) -> None:
    one = replace(config, stages=config.stages[:1])
    assert run_train(one, tmp_path / "new" / "run").is_dir()


def test_unknown_data_is_refused_before_anything_runs(run_train: Any, config: TrainConfig, tmp_path: Path) -> None:
    wrong = replace(config, stages=(*config.stages[:1], stage("later", data="question")))
    with pytest.raises(ConfigError, match=r"stages\.later\.data is 'question' .did you mean 'questions'"):
        run_train(wrong, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_image_that_is_not_in_the_table_is_named(
    config: TrainConfig, image_table: ImageTable, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lost = vqa_sample(id="1", source="s", image="lost", question="what?", answer="red")
    with pytest.raises(DataError, match="image 'lost' is not in"):
        train(config, {"questions": [lost], "captions": [lost]}, image_table, tokenizer, tmp_path)


@pytest.mark.parametrize("parts", [("vision",), ("projector", "language"), ("vision", "projector", "language")])
def test_trained_parts_are_exactly_those_named(
    parts: tuple[str, ...], fresh_model: NVILAForConditionalGeneration
) -> None:
    groups = trained_parts(fresh_model, stage("s", lr={part: 10.0 ** -len(part) for part in parts}))
    assert [group.name for group in groups] == [part for part in PREFIXES if part in parts]
    for group in groups:
        assert group.lr == 10.0 ** -len(group.name)
        assert len({id(parameter) for parameter in group.parameters}) == len(group.parameters)
    names = {name for name, parameter in fresh_model.named_parameters() if parameter.requires_grad}
    prefixes = tuple(prefix for part in parts for prefix in PREFIXES[part])
    assert names == {name for name, _ in fresh_model.named_parameters() if name.startswith(prefixes)}
    assert sum(len(group.parameters) for group in groups) == len(names)
