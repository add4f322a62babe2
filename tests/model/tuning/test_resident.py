"""What stays in memory of a base whose layers are kept in 4 bits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nvila.tuning.four_bit import four_bit_layer
from nvila.tuning.resident import give_back


class Base(nn.Module):
    """A wide layer, and a small one that stays wide."""

    def __init__(self, stored: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.norm.weight = nn.Parameter(stored["norm"])
        self.layer = nn.Linear(64, 64, bias=False)
        self.layer.weight = nn.Parameter(stored["layer"])


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_file_of_the_weights_is_left_once_layers_are_in_4_bits(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"norm": torch.full((64,), 3.0), "layer": torch.randn(64, 64)}, path)
    model = Base(load_file(path))
    # A circle, as modules have them: only the collector frees what hangs on it.
    model.layer.circle = [model.layer]  # type: ignore[assignment]  # of no module's types
    model.layer = four_bit_layer(model.layer)
    assert mapped(path)
    give_back(model)
    assert not mapped(path)
    assert torch.equal(model.norm.weight, torch.full((64,), 3.0))
    assert model.norm.weight.requires_grad
