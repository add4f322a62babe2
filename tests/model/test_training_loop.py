from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nvila.data.collation import collate
from nvila.data.conversation import ConversationEncoder, Encoded
from nvila.data.records import vqa_sample
from nvila.data.tensors import PixelCache
from nvila.errors import NvilaError
from nvila.modeling import NVILAForConditionalGeneration, NVILAOutput
from nvila.training.augmentation import random_shift
from nvila.training.config import ModelConfig, StageConfig, TrainConfig
from nvila.training.engine import build_engine
from nvila.training.loop import MetricsLog, check_finite, global_token_weight, learning_rate_scale, run_stage
from nvila.training.run import trained_parts


def stage(**changes: Any) -> StageConfig:
    values: dict[str, Any] = {
        "name": "instruct", "data": "d", "steps": 5, "lr": {"projector": 1e-2, "language": 1e-3}, "images_per_step": 1,
        "samples_per_image": 1, "warmup_steps": 0, "schedule": "linear",
    }  # fmt: skip
    return StageConfig(**(values | changes))


class Events:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int]] = []
        self.metrics: list[dict[str, float]] = []

    def progress(self, phase: str, done: int, total: int, metrics: Any = None) -> None:
        self.steps.append((phase, done, total))
        self.metrics.append(dict(metrics))

    def notice(self, text: str) -> None:
        raise AssertionError(text)


class ScriptedEngine:
    """An engine whose losses are given; it remembers what it was asked to do."""

    def __init__(self, losses: list[float]) -> None:
        self.module: nn.Module = nn.Linear(1, 1)
        self.calls: list[str] = []
        self.pixels: list[Tensor] = []
        self.rates: list[float] = []
        self._losses = iter(losses)

    def __call__(self, **inputs: Any) -> NVILAOutput:
        self.calls.append("forward")
        self.pixels.append(inputs["pixel_values"])
        return NVILAOutput(loss=torch.tensor(next(self._losses), requires_grad=True))

    def backward(self, loss: Tensor) -> None:
        self.calls.append("backward")

    def step(self, lr_scale: float) -> None:
        self.calls.append("step")
        self.rates.append(lr_scale)

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def groups(encoder: ConversationEncoder) -> list[list[Encoded]]:
    return [[encoder(vqa_sample(id="1", source="s", image="a", question="what?", answer="red"))]]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "linear", "steps": 4}, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine", "steps": 4}, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ({"schedule": "linear", "steps": 4, "warmup_steps": 2}, [0.5, 0.75, 0.5, 0.25]),
        ({"schedule": "linear", "steps": 2, "warmup_steps": 4}, [0.25, 0.25]),
        ({"schedule": "cosine", "steps": 1}, [1]),
    ],
)
def test_learning_rate_warms_up_and_decays(changes: dict[str, Any], expected: list[float]) -> None:
    config = stage(**changes)
    assert [learning_rate_scale(step, config) for step in range(config.steps)] == pytest.approx(expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_loss_that_is_no_number_stops_before_the_weights_are_touched(
    bad: float, groups: list[list[Encoded]], tiles: PixelCache, model_config: ModelConfig, tmp_path: Path
) -> None:
    engine = ScriptedEngine([1.0, bad, 1.0])
    config = TrainConfig(model=model_config, stages=(stage(),))
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(
        NvilaError, match=r"stage 'instruct' step 1: the loss is -?(nan|inf).*lower stages\.instruct\.lr"
    ):
        run_stage(engine, itertools.repeat(groups), tiles, stage(), config, pad_token_id=0, log=log)
    assert engine.calls == ["forward", "backward", "step", "forward"]


def test_real_model_with_a_broken_weight_is_not_trained_further(
    groups: list[list[Encoded]],
    tiles: PixelCache,
    fresh_model: NVILAForConditionalGeneration,
    model_config: ModelConfig,
    tmp_path: Path,
) -> None:
    with torch.no_grad():
        fresh_model.model.mm_projector.layers[2].bias[0] = float("nan")
    config = TrainConfig(model=model_config, stages=(stage(),), backend="torch")
    engine = build_engine(fresh_model, trained_parts(fresh_model, stage()), config)
    before = {name: tensor.clone() for name, tensor in fresh_model.state_dict().items()}
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(NvilaError, match="step 0: the loss is nan"):
        run_stage(engine, itertools.repeat(groups), tiles, stage(), config, pad_token_id=0, log=log)
    assert all(torch.equal(t, before[n]) or bool(t.isnan().any()) for n, t in fresh_model.state_dict().items())


def test_steps_are_reported_and_use_the_schedule(
    groups: list[list[Encoded]], tiles: PixelCache, model_config: ModelConfig, tmp_path: Path
) -> None:
    engine, events = ScriptedEngine([4.0, 3.0, 2.0, 1.0, 0.5]), Events()
    config = TrainConfig(model=model_config, stages=(stage(),))
    log = MetricsLog(tmp_path / "metrics.jsonl", every=2)
    run_stage(engine, itertools.repeat(groups), tiles, stage(), config, pad_token_id=0, log=log, reporter=events)
    assert events.steps == [("instruct", done, 5) for done in range(1, 6)]
    assert engine.rates == [learning_rate_scale(step, stage()) for step in range(5)]
    assert engine.module.training
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["stage"], line["step"], line["loss"]) for line in lines] == [
        ("instruct", 0, 4.0), ("instruct", 2, 2.0), ("instruct", 4, 0.5),
    ]  # fmt: skip
    # The progress line's loss moves a twentieth of the way at every step.
    assert events.metrics[1]["loss"] == pytest.approx(4 - 1 / 20)
    assert all(metrics["tokens_per_second"] > 0 for metrics in events.metrics)


def test_tiles_are_shifted_by_the_seed_of_the_run_and_differently_by_every_rank(
    groups: list[list[Encoded]],
    tiles: PixelCache,
    model_config: ModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seen(seed: int, shift: int) -> list[Tensor]:
        engine = ScriptedEngine([1.0] * 5)
        config = TrainConfig(model=model_config, stages=(stage(),), seed=seed)
        log = MetricsLog(tmp_path / "metrics.jsonl")
        moved = stage(max_shift_pixels=shift)
        run_stage(engine, itertools.repeat(groups), tiles, moved, config, pad_token_id=0, log=log)
        return engine.pixels

    plain = tiles(("a",))
    assert all(torch.equal(pixels, plain) for pixels in seen(0, 0))
    noise = torch.Generator().manual_seed(7)
    for pixels in seen(7, 3):
        assert torch.equal(pixels, random_shift(plain, 3, noise))
    first = seen(7, 3)
    monkeypatch.setenv("RANK", "1")
    assert not all(torch.equal(one, other) for one, other in zip(first, seen(7, 3), strict=True))


def test_weight_of_a_single_process_is_one(groups: list[list[Encoded]]) -> None:
    assert global_token_weight(collate(groups, 0)) == 1.0


def test_finite_loss_passes_as_a_number() -> None:
    assert check_finite(torch.tensor(1.5, requires_grad=True), "s", 0) == 1.5
