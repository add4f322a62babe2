"""Two real processes and ZeRO: steps, skipped steps, checkpoints that know neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from nvila.training.config import TrainConfig

deepspeed = pytest.importorskip("deepspeed", reason="deepspeed is an extra")
Reports = Mapping[str, Any]


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], share: float = 1e-3) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # The gradient of a key's bias in the tower is zero but for rounding, which Adam blows up to full steps.
        if not name.endswith("k_proj.bias"):
            assert float((found[name] - tensor).norm()) < share * float(tensor.norm()) + 5e-3, name


def one_stage(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The second stage alone, without the random shifts that differ by process."""
    stages = (replace(config.stages[1], max_shift_pixels=0),)
    values: dict[str, Any] = {"backend": "deepspeed", "stages": stages}
    return replace(config, **values | changes)


def job(name: str, config: TrainConfig, folder: Path, **changes: Any) -> dict[str, Any]:
    return {"name": name, "config": config.to_dict(), "out": str(folder / name), **changes}
