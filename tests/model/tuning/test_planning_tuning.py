"""The plan of a tuning against what a real step takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from nvila.configuration import NVILAConfig
from nvila.errors import ResourceError
from nvila.training.config import PrecisionConfig
from nvila.training.observer import StepRecord
from nvila.tuning.adapters import base_digest
from nvila.tuning.config import TuneConfig
from nvila.tuning.measuring import LiveTensors, StepClock
from nvila.tuning.methods import learning_rates, parse_method
from nvila.tuning.planner import Option, Planner, check_fits, pick, step_operations
from nvila.tuning.run import tune
from nvila.tuning.tracing import BatchShape, TracedStep

if TYPE_CHECKING:
    from nvila.tuning.data import TuneData


def planner_of(base: Path, data: TuneData, method: str, available: int = 2**40, precision: str = "fp32") -> Planner:
    chosen = parse_method(method, rank=8)
    tokens = data.batch_tokens(16)
    config = TuneConfig(
        method=chosen,
        rates=learning_rates(chosen, 1e-3),
        batch_tokens=tokens,
        micro_batch_tokens=tokens,
        max_length=data.max_length,
        steps=2,
        patience=None,
        precision=PrecisionConfig(name=precision),  # type: ignore[arg-type]  # a word of the table
    )
    return Planner(
        config=NVILAConfig.from_pretrained(base), data=data, tune=config, available=available, operations_per_second=1e9
    )


@pytest.mark.parametrize(
    ("method", "precision", "checkpointing", "parts"),
    [
        ("ln+lora", "fp32", False, 1),
        ("ln+qlora", "fp32", False, 2),
        pytest.param("lora+dora", "fp32", False, 1, marks=pytest.mark.slow),
        pytest.param("full+full", "fp32", False, 2, marks=pytest.mark.slow),
        pytest.param("ln+qlora", "bf16", False, 1, marks=pytest.mark.slow),
        pytest.param("ln+lora", "fp32", True, 1, marks=pytest.mark.slow),
    ],
)
def test_the_predicted_peak_is_within_fifteen_percent(
    color_data: TuneData,
    saved_model: Path,
    tmp_path: Path,
    method: str,
    precision: str,
    checkpointing: bool,
    parts: int,
) -> None:
    planner = planner_of(saved_model, color_data, method, precision=precision)
    micro = planner.tune.batch_tokens // parts
    option = planner.option(planner.tune.method, micro, checkpointing=checkpointing)
    config = replace(planner.tune, micro_batch_tokens=micro, gradient_checkpointing=checkpointing)
    tuned = tune(config, saved_model, base_digest(saved_model), color_data, tmp_path / "out")
    assert tuned.peak_bytes is not None
    assert option.step.peak == pytest.approx(tuned.peak_bytes, rel=0.15)


@pytest.mark.slow
def test_less_memory_takes_smaller_batches_then_recomputing(color_data: TuneData, saved_model: Path) -> None:
    planner = planner_of(saved_model, color_data, "ln+lora")
    whole = planner.best(planner.tune.method)
    assert (whole.micro_batch_tokens, whole.checkpointing) == (planner.tune.batch_tokens, False)
    planner.available = whole.step.peak - 1
    smaller = planner.best(planner.tune.method)
    assert smaller.fits
    assert smaller.micro_batch_tokens < whole.micro_batch_tokens
    planner.available = 1000
    least = planner.best(planner.tune.method)
    assert not least.fits
    with pytest.raises(ResourceError, match="even with the smallest batches") as error:
        check_fits(least)
    assert "ln+qlora" in error.value.hint


def test_recommended_methods_are_picked_first() -> None:
    def option(name: str, peak: int, seconds: float) -> Option:
        step = TracedStep(peak=peak, weights=peak, gradients=0, moments=0)
        return Option(
            method=parse_method(name),
            micro_batch_tokens=1,
            checkpointing=False,
            step=step,
            available=10,
            seconds=seconds,
        )

    both = [option("full+full", 5, 1.0), option("ln+qlora", 4, 3.0), option("ln+lora", 8, 2.0)]
    assert pick(both) is both[2]
    assert pick(both[:2]) is both[1]
    assert pick(both[:1]) is both[0]
    assert pick([option("ln+lora", 11, 1.0)]) is None
    assert option("ln+lora", 10 + 2**21, 1.0).why == "2.0 MiB too much, 2.0 MiB are weights"


def test_frozen_parts_cost_less_time(saved_model: Path) -> None:
    config, shape = NVILAConfig.from_pretrained(saved_model), BatchShape(rows=2, row=20, tiles=2, supervised=4)

    def cost(name: str, **options: bool) -> float:
        return step_operations(config, parse_method(name), shape, **options)

    assert cost("frozen+frozen+lora") < cost("ln+lora") < cost("full+full")
    assert cost("ln+lora") < cost("ln+qlora")
    assert cost("ln+lora") < cost("ln+lora", checkpointing=True)


@pytest.mark.parametrize(("device", "seconds"), [("cpu", 16.0), ("cuda", 12.0)])
def test_steps_are_timed_behind_those_that_are_counted(device: str, seconds: float) -> None:
    clock = StepClock(device)
    values = {"stage": "tune", "steps": 22, "loss": 1.0, "grad_norm": 1.0, "lr_scale": 1.0, "data_seconds": 0.0}
    for step in range(1, 23):
        if device == "cpu" and step == 10:
            assert clock.seconds is None
        clock.on_step(
            StepRecord(step=step, tokens=1, samples=1, images=0, seconds=float(step), skipped=False, **values)  # type: ignore[arg-type]
        )
    assert clock.seconds == seconds


def test_processes_share_a_step(color_data: TuneData, saved_model: Path) -> None:
    alone, shared = (replace(planner_of(saved_model, color_data, "ln+lora"), processes=number) for number in (1, 2))
    one, two = (planner.best(planner.tune.method) for planner in (alone, shared))
    assert two.micro_batch_tokens == one.micro_batch_tokens // 2
    assert two.step.activations < one.step.activations
    assert two.seconds < 0.7 * one.seconds


def test_live_tensors_count_each_storage_once_and_forget_it() -> None:
    given = torch.zeros(100)
    with LiveTensors([given]) as live:
        assert live.current == 400
        made = given + 1
        view = made.view(10, 10)
        assert live.current == 800
        del made
        assert live.current == 800
        del view
        assert live.current == 400
    assert live.peak == 800
