"""Records of training as a loop would make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from nvila.training.config import ModelConfig, StageConfig, TrainConfig
from nvila.training.observer import StageStart, StepRecord

MakeRecord = Callable[..., StepRecord]
MakeStart = Callable[..., StageStart]


class Heard:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, int, dict[str, float]]] = []
        self.notices: list[str] = []

    def progress(self, phase: str, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        self.events.append((phase, done, total, dict(metrics or {})))

    def notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.fixture
def record() -> MakeRecord:
    """Make a step of ten."""

    def make(step: int = 1, **changes: Any) -> StepRecord:
        values: dict[str, Any] = {
            "stage": "align", "step": step, "steps": 10, "loss": 2.0, "grad_norm": 0.5, "lr_scale": 1.0,
            "tokens": 1000, "samples": 10, "images": 5, "seconds": 0.5, "data_seconds": 0.1,
        }  # fmt: skip
        return StepRecord(**(values | changes))

    return make


@pytest.fixture
def start() -> MakeStart:
    """Make the beginning of a stage."""

    def make(stage: str = "align", **changes: Any) -> StageStart:
        values: dict[str, Any] = {"stage": stage, "steps": 10, "first_step": 0, "parameters": 7, "world_size": 1}
        return StageStart(**(values | changes))

    return make


@pytest.fixture
def heard() -> Heard:
    """A reporter that keeps what it is told."""
    return Heard()


@pytest.fixture
def config() -> TrainConfig:
    stage = StageConfig(
        name="align", data="d", steps=10, lr={"projector": 1e-3}, images_per_step=1, samples_per_image=1,
        warmup_steps=0, schedule="linear",
    )  # fmt: skip
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    language = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    language |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = ModelConfig(
        vision=vision, language=language, projector="mlp_downsample_2x2_fix", select_layer=-1, max_length=64
    )
    return TrainConfig(model=model, stages=(stage,))
