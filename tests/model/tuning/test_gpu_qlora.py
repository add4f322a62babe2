"""QLoRA on a GPU, where the frozen language model is held in bitsandbytes' four-bit layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nvila.training.config import PrecisionConfig
from nvila.tuning.adapters import base_digest, is_adapter
from nvila.tuning.config import TuneConfig
from nvila.tuning.held_out import read_losses
from nvila.tuning.methods import learning_rates, parse_method
from nvila.tuning.run import tune

if TYPE_CHECKING:
    from nvila.tuning.data import TuneData

pytestmark = pytest.mark.gpu


def test_qlora_tunes_on_four_bit_layers(color_data: TuneData, saved_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is part of the extra tune-gpu")

    method = parse_method("ln+qlora", rank=8, alpha=32.0)
    config = TuneConfig(
        method=method,
        rates=learning_rates(method, 5e-3),
        batch_tokens=color_data.batch_tokens(8),
        micro_batch_tokens=color_data.batch_tokens(4),
        max_length=color_data.max_length,
        steps=12,
        eval_every=4,
        precision=PrecisionConfig(name="bf16"),
    )
    tuned = tune(config, saved_model, base_digest(saved_model), color_data, tmp_path / "out", device="cuda")
    assert is_adapter(tuned.directory)
    losses = [one.loss for one in read_losses(tmp_path / "out")]
    assert losses[-1] < losses[0]
    assert tuned.peak_bytes is not None
