from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from nvila.errors import ConfigError
from nvila.training.config import Fp8Config, ModelConfig, PrecisionConfig, StageConfig, TrainConfig


def stage(**changes: Any) -> StageConfig:
    values: dict[str, Any] = {
        "name": "align", "data": "captions", "steps": 4, "lr": {"projector": 1e-3}, "images_per_step": 2,
        "samples_per_image": 1, "warmup_steps": 0, "schedule": "cosine",
    }  # fmt: skip
    return StageConfig(**(values | changes))


def test_configuration_comes_back_from_json(model_config: ModelConfig) -> None:
    config = TrainConfig(
        model=model_config,
        stages=(stage(), stage(name="instruct", lr={"vision": 1e-4, "language": 2e-4}, max_shift_pixels=2)),
        precision=PrecisionConfig(name="fp8", fp8=Fp8Config(min_features=32)),
        backend="torch",
        betas=(0.8, 0.95),
        seed=9,
    )
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("lr", "named"), [({"head": 1.0, "vision": 1.0}, r"\['head'\]"), ({}, "no part")])
def test_stage_that_trains_no_known_part_is_refused(lr: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"stages\.align\.lr names {named} .parts are vision, projector, language"):
        stage(lr=lr)


def test_run_without_stages_or_with_two_of_one_name_is_refused(model_config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="no stage"):
        TrainConfig(model=model_config, stages=())
    with pytest.raises(ConfigError, match="'align'"):
        TrainConfig(model=model_config, stages=(stage(), replace(stage(), steps=2)))
