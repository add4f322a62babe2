from __future__ import annotations

import json
import math
from collections.abc import Mapping
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
from nvila.progress import SILENT, Reporter
from nvila.training.augmentation import random_shift
from nvila.training.batches import BatchSource, MicroBatch
from nvila.training.config import HealthConfig, ModelConfig, StageConfig, TrainConfig
from nvila.training.engine import StepOutcome, TrainEngine, build_engine
from nvila.training.loop import StageLoop, learning_rate_scale
from nvila.training.metrics import MetricsLog
from nvila.training.observer import StageStart, StepRecord
from nvila.training.partitions import Partitions
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
        self.notices: list[str] = []

    def progress(self, phase: str, done: int, total: int, metrics: Any = None) -> None:
        self.steps.append((phase, done, total))
        self.metrics.append(dict(metrics))

    def notice(self, text: str) -> None:
        self.notices.append(text)


class Watcher:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.starts: list[StageStart] = []
        self.records: list[StepRecord] = []
        self.ends: list[str] = []

    def on_stage_start(self, start: StageStart) -> None:
        self.starts.append(start)

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)

    def on_notice(self, text: str) -> None:
        pass

    def on_stage_end(self, stage: str) -> None:
        self.ends.append(stage)


class ScriptedEngine:
    """An engine whose losses are given; it remembers what it was asked to do."""

    def __init__(self, losses: list[float]) -> None:
        self.module: nn.Module = nn.Linear(1, 1)
        self.layout = ("scripted", 0)
        self.calls: list[str] = []
        self.pixels: list[Tensor] = []
        self.rates: list[float] = []
        self.weights: list[float] = []
        self.lasts: list[bool] = []
        self._losses = iter(losses)
        self._broken = False

    def __call__(self, **inputs: Any) -> NVILAOutput:
        self.calls.append("forward")
        self.pixels.append(inputs["pixel_values"])
        return NVILAOutput(loss=torch.tensor(next(self._losses), requires_grad=True))

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        self.calls.append("backward")
        self.weights.append(float(loss.detach()))
        self.lasts.append(last)
        self._broken = self._broken or not math.isfinite(float(loss.detach()))

    def step(self, lr_scale: float) -> StepOutcome:
        self.calls.append("step")
        self.rates.append(lr_scale)
        outcome = StepOutcome(grad_norm=math.nan if self._broken else 2.0, applied=not self._broken)
        self._broken = False
        return outcome

    def partitions(self) -> Partitions:
        raise NotImplementedError

    def whole_weights(self) -> None:
        return None

    def close(self) -> None:
        self.calls.append("close")


class Repeat:
    """A source that gives the same step for ever."""

    def __init__(self, *micro_batches: list[list[Encoded]]) -> None:
        self._micro_batches = list(micro_batches)

    def __next__(self) -> list[MicroBatch]:
        return self._micro_batches

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def loop(
    engine: TrainEngine,
    source: BatchSource,
    pixels: PixelCache,
    model_config: ModelConfig,
    folder: Path,
    *,
    watcher: Watcher | None = None,
    reporter: Reporter = SILENT,
    every: int = 20,
    seed: int = 0,
    health: HealthConfig | None = None,
    **changes: Any,
) -> StageLoop:
    one = stage(**changes)
    return StageLoop(
        engine=engine,
        batches=source,
        pixels=pixels,
        stage=one,
        config=TrainConfig(
            model=model_config, stages=(one,), backend="torch", seed=seed, health=health or HealthConfig()
        ),
        pad_token_id=0,
        log=MetricsLog(folder / "metrics.jsonl", every=every, reporter=reporter),
        observers=[watcher] if watcher else [],
        skipped_path=folder / "skipped.jsonl",
    )


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
def test_loss_that_is_no_number_is_skipped_and_its_samples_are_named(
    bad: float, groups: list[list[Encoded]], tiles: PixelCache, model_config: ModelConfig, tmp_path: Path
) -> None:
    engine, events, watcher = ScriptedEngine([1.0, bad, 1.0, 1.0, 1.0]), Events(), Watcher()
    loop(engine, Repeat(groups), tiles, model_config, tmp_path, watcher=watcher, reporter=events, every=1).run()
    assert [record.skipped for record in watcher.records] == [False, True, False, False, False]
    # Whatever the loss was, its gradient is no number, so that no backend could take the step.
    assert math.isnan(engine.weights[1])
    line = json.loads((tmp_path / "skipped.jsonl").read_text(encoding="utf-8"))
    assert line == {"stage": "instruct", "step": 2, "loss": str(bad), "grad_norm": "nan", "ids": ["1"]}
    assert len(events.notices) == 1
    assert "instruct step 2: skipped" in events.notices[0]
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 3, 4]


@pytest.mark.parametrize(
    ("losses", "health", "limit"),
    [
        ([1, "x", "x", "x"], {"max_skipped_in_row": 2}, "3 skipped steps are more .*max_skipped_in_row=2"),
        (["x", 1, "x", 1, "x"], {"max_skipped": 2}, "3 skipped steps are more than train.health.max_skipped=2"),
        (["x"], {"max_skipped": 0}, "1 skipped steps are more than train.health.max_skipped=0"),
        (["x"] * 5, {"max_skipped_in_row": 9}, "every step was skipped"),
    ],
)  # fmt: skip
def test_more_skipped_steps_than_allowed_end_the_stage(
    losses: list[Any],
    health: dict[str, int],
    limit: str,
    groups: list[list[Encoded]],
    tiles: PixelCache,
    model_config: ModelConfig,
    tmp_path: Path,
) -> None:
    engine = ScriptedEngine([math.nan if loss == "x" else 1.0 for loss in losses])
    with pytest.raises(NvilaError, match=limit) as caught:
        loop(engine, Repeat(groups), tiles, model_config, tmp_path, health=HealthConfig(**health)).run()
    assert "lower stages.instruct.lr" in caught.value.hint
    assert engine.calls.count("step") == len(losses)


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
    with pytest.raises(NvilaError, match="step 4: the loss is nan"):
        loop(engine, Repeat(groups), tiles, model_config, tmp_path).run()
    assert all(torch.equal(t, before[n]) or bool(t.isnan().any()) for n, t in fresh_model.state_dict().items())


def test_steps_are_reported_and_use_the_schedule(
    groups: list[list[Encoded]], tiles: PixelCache, model_config: ModelConfig, tmp_path: Path
) -> None:
    engine, events, watcher = ScriptedEngine([4.0, 3.0, 2.0, 1.0, 0.5]), Events(), Watcher()
    loop(engine, Repeat(groups), tiles, model_config, tmp_path, watcher=watcher, reporter=events, every=2).run()
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
    assert watcher.starts == [StageStart(stage="instruct", steps=5, first_step=0, parameters=2, world_size=1)]
    assert watcher.ends == ["instruct"]
    record = watcher.records[2]
    assert (record.step, record.steps, record.loss, record.grad_norm, record.lr_scale) == (3, 5, 2.0, 2.0, 0.6)
    batch = collate(groups, 0)
    assert (record.tokens, record.samples, record.images) == (batch.num_tokens, 1, 1)
    assert 0 <= record.data_seconds <= record.seconds


def test_micro_batches_count_by_their_supervised_tokens(
    encoder: ConversationEncoder, tiles: PixelCache, model_config: ModelConfig, tmp_path: Path
) -> None:
    short = [[encoder(vqa_sample(id="1", source="s", image="a", question="what?", answer="red"))]]
    long = [[encoder(vqa_sample(id="2", source="s", image="b", question="what?", answer="the red circle here now"))]]
    engine, watcher = ScriptedEngine([3.0, 5.0]), Watcher()
    loop(engine, Repeat(short, long), tiles, model_config, tmp_path, watcher=watcher, steps=1).run()
    counts = [collate(rows, 0).num_supervised for rows in (short, long)]
    assert counts[0] != counts[1]
    shares = [count / sum(counts) for count in counts]
    assert engine.weights == pytest.approx([3.0 * shares[0], 5.0 * shares[1]])
    assert engine.lasts == [False, True]
    assert engine.calls == ["forward", "backward"] * 2 + ["step"]
    assert watcher.records[0].loss == pytest.approx(3.0 * shares[0] + 5.0 * shares[1])
    assert (watcher.records[0].samples, watcher.records[0].images) == (2, 2)


def test_tiles_are_shifted_by_the_seed_of_the_run_and_differently_by_every_rank(
    groups: list[list[Encoded]],
    tiles: PixelCache,
    model_config: ModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seen(seed: int, shift: int) -> list[Tensor]:
        engine = ScriptedEngine([1.0] * 5)
        loop(engine, Repeat(groups), tiles, model_config, tmp_path, seed=seed, max_shift_pixels=shift).run()
        return engine.pixels

    plain = tiles(("a",))
    assert all(torch.equal(pixels, plain) for pixels in seen(0, 0))
    noise = torch.Generator().manual_seed(7)
    for pixels in seen(7, 3):
        assert torch.equal(pixels, random_shift(plain, 3, noise))
    first = seen(7, 3)
    monkeypatch.setenv("RANK", "1")
    assert not all(torch.equal(one, other) for one, other in zip(first, seen(7, 3), strict=True))
