"""The plan of a stage with a token budget: what fits into a step, into a forward pass, and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from nvila.data.stage_data import tile_positions
from nvila.errors import ConfigError
from nvila.training.config import ModelConfig, StageConfig, TrainConfig
from nvila.training.planning.devices import gpu_named
from nvila.training.planning.plan import AssumedSample, Hardware, StagePlan, plan_training
from nvila.training.planning.sizes import meta_model, nvila_config

# One tile of 4 visual tokens and their line feed, and the text.
POSITIONS = 4 + 1 + 20


def planned(model: ModelConfig, gpus: int = 1, **changes: Any) -> StagePlan:
    values: dict[str, Any] = {"name": "one", "data": "d", "epochs": 1.0, "lr": {"language": 1e-3}, "schedule": "cosine"}
    config = TrainConfig(model=model, stages=(StageConfig(**(values | changes)),), backend="torch")
    sample = AssumedSample(samples=95, images=((40, 40),), text_tokens=20, answer_tokens=5)
    (plan,) = plan_training(config, {"one": sample}, Hardware(gpu=gpu_named("h100"), gpus=gpus))
    return plan


@pytest.fixture
def cost(model_config: ModelConfig) -> int:
    """What a sample takes of the budget."""
    return POSITIONS + tile_positions(meta_model(nvila_config(model_config)))


def test_a_step_holds_what_the_budget_holds(model_config: ModelConfig, cost: int) -> None:
    plan = planned(model_config, batch_tokens=10 * cost + 1, micro_batch_tokens=3 * cost)
    assert cost > POSITIONS
    assert (plan.samples_per_step, plan.samples_per_gpu, plan.steps) == (10, 3, 10)
    assert (plan.positions_per_sample, plan.positions_per_step) == (POSITIONS, 10 * POSITIONS)
    images = planned(model_config, images_per_step=10)
    assert plan.operations_per_step == images.operations_per_step
    three = planned(model_config, images_per_step=3)
    assert [one.activations for one in plan.memory] == [one.activations for one in three.memory]


def test_without_a_size_of_forward_passes_a_gpu_takes_its_share(model_config: ModelConfig, cost: int) -> None:
    assert planned(model_config, 2, batch_tokens=20 * cost).samples_per_gpu == 10


def test_a_packed_row_looks_at_itself(model_config: ModelConfig, cost: int) -> None:
    budget = {"batch_tokens": 12 * cost, "micro_batch_tokens": 6 * cost, "max_length": 3 * cost + 1}
    packed, single = planned(model_config, pack=True, **budget), planned(model_config, **budget)
    assert (packed.samples_per_step, packed.samples_per_gpu) == (12, 6)
    assert packed.operations_per_step > single.operations_per_step
    assert packed.positions_per_step == single.positions_per_step


def test_budgets_that_are_too_small_are_named(model_config: ModelConfig, cost: int) -> None:
    with pytest.raises(ConfigError, match=r"batch_tokens is \d+ and cannot be dealt to 4 GPUs.*plan\.gpus=3"):
        planned(model_config, 4, batch_tokens=4 * cost - 1)
    with pytest.raises(ConfigError, match=rf"micro_batch_tokens is {cost - 1}, but a sample of the plan counts for"):
        planned(model_config, batch_tokens=4 * cost, micro_batch_tokens=cost - 1)
