from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from nvila.errors import ConfigError
from nvila.training.config import CheckpointConfig, HealthConfig, ModelConfig, TrainConfig
from nvila.training.health import Health
from nvila.training.metrics import drop_lines
from nvila.training.observer import StepRecord


def record(step: int, loss: float = 1.0, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "stage": "s", "step": step, "steps": 999, "loss": loss, "grad_norm": 1.0, "lr_scale": 1.0, "tokens": 1,
        "samples": 1, "images": 1, "seconds": 1.0, "data_seconds": 0.0,
    }  # fmt: skip
    return StepRecord(**values | changes)


def follow(health: Health, losses: Iterable[float]) -> list[str]:
    return [text for step, loss in enumerate(losses, start=1) for text in health.observe(record(step, loss))]


def noisy(count: int) -> list[float]:
    return [2.0 + 0.1 * math.sin(7 * number) for number in range(count)]


def test_loss_that_jumps_is_told_once() -> None:
    notices = follow(Health(HealthConfig()), [*noisy(40), 4.0, *noisy(40)])
    assert len(notices) == 1
    assert notices[0].startswith("stage s step 41: the loss jumped to 4,")


@pytest.mark.parametrize(
    "losses",
    [
        [*noisy(40), 2.15, *noisy(9)],
        [*noisy(40), 0.1],
        [*noisy(10), 9.0],
        [8 * 0.9**number for number in range(60)],
        [1.0] * 40 + [1.05],
    ],
    ids=["noise", "drop", "too early", "learning", "flat"],
)
def test_ordinary_losses_are_not_told(losses: list[float]) -> None:
    assert follow(Health(HealthConfig()), losses) == []


def test_threshold_decides_and_can_be_taken_away() -> None:
    losses = [*noisy(40), 2.6]
    assert follow(Health(HealthConfig(spike_threshold=100.0)), losses) == []
    assert follow(Health(HealthConfig(spike_threshold=None)), [*noisy(40), 99.0]) == []
    assert len(follow(Health(HealthConfig(spike_threshold=3.0)), losses)) == 1


def test_what_a_resumed_stage_must_know_comes_back() -> None:
    first, second = Health(HealthConfig(max_skipped=3)), Health(HealthConfig(max_skipped=3))
    follow(first, noisy(40))
    first.observe(record(41, math.nan, skipped=True))
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert len(follow(second, [4.0])) == 1


def test_waiting_for_data_is_told_once_a_window() -> None:
    health = Health(HealthConfig())
    told = [health.observe(record(step, data_seconds=0.6)) for step in range(1, 101)]
    assert [step for step, notices in enumerate(told, start=1) if notices] == [50, 100]
    assert told[49] == [
        "stage s: 60% of the last 50 steps was spent waiting for data; use more loader workers or a faster disk"
    ]


@pytest.mark.parametrize(("share", "waiting"), [(0.5, 0.4), (None, 0.9), (0.95, 0.9)])
def test_waiting_that_is_borne_is_not_told(share: float | None, waiting: float) -> None:
    health = Health(HealthConfig(stall_share=share))
    assert not any(health.observe(record(step, data_seconds=waiting)) for step in range(1, 101))


def test_lines_that_come_again_and_cut_ones_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    drop_lines(path, "b", 2)
    assert not path.exists()
    lines = [f'{{"stage": "{stage}", "step": {step}}}\n' for stage in "ab" for step in range(4)]
    path.write_text("".join(lines) + '{"stage": "b", "st', encoding="utf-8")
    drop_lines(path, "b", 2)
    assert path.read_text(encoding="utf-8") == "".join(lines[:6])


@pytest.mark.parametrize(
    ("config", "values", "named"),
    [
        (CheckpointConfig, {"every_steps": 0}, "train.checkpoints.every_steps is 0"),
        (CheckpointConfig, {"keep": 0}, "train.checkpoints.keep is 0"),
        (CheckpointConfig, {"every_minutes": 0.0}, "train.checkpoints.every_minutes is 0"),
        (HealthConfig, {"max_skipped": -1}, "train.health.max_skipped is -1"),
        (HealthConfig, {"max_skipped_in_row": -1}, "train.health.max_skipped_in_row is -1"),
        (HealthConfig, {"spike_threshold": 0.0}, "train.health.spike_threshold is 0"),
        (HealthConfig, {"stall_share": 1.5}, "train.health.stall_share is 1.5"),
    ],
)
def test_settings_without_sense_are_refused(config: Any, values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config(**values)


@pytest.mark.parametrize(("backend", "zero_stage"), [("torch", 2), ("deepspeed", 0)])
def test_offload_needs_zero(
    backend: Any, zero_stage: int, small_config: TrainConfig, model_config: ModelConfig
) -> None:
    with pytest.raises(ConfigError, match=r"train\.offload=optimizer needs DeepSpeed and ZeRO"):
        TrainConfig(
            model=model_config,
            stages=small_config.stages,
            backend=backend,
            zero_stage=zero_stage,
            offload="optimizer",
        )
