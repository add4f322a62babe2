"""Tuning on a GPU: bitsandbytes' 4-bit layers learn, and the allocator's peak is what is claimed and planned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nvila.assembly import build_model, build_processor, load_model, save_model
from nvila.configuration import NVILAConfig
from nvila.data.mixtures import Registry
from nvila.data.tokenizers import build_word_tokenizer
from nvila.processing import NVILAProcessor
from nvila.training.config import ModelConfig, PrecisionConfig
from nvila.tuning.adapters import base_digest
from nvila.tuning.config import TuneConfig
from nvila.tuning.data import TuneData, open_tune_data
from nvila.tuning.methods import learning_rates, parse_method
from nvila.tuning.planner import Planner
from nvila.tuning.run import Tuned, load_base, tune

pytestmark = pytest.mark.gpu

COLORS = ("red", "blue", "green")
WORDS = "what color is the shape ? red blue green"
# Weights outweigh activations, as they do in a model of real size: 0.6 billion parameters.
LARGE = (2048, 5632, 12)
SMALL = (128, 256, 2)


def write_base(folder: Path, hidden: int, inner: int, layers: int) -> Path:
    """Write a model with new weights; widths are multiples of what 4-bit kernels take."""
    torch.manual_seed(0)
    tokenizer = build_word_tokenizer((WORDS,), model_max_length=128)
    config = ModelConfig(
        vision={
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
        language={
            "model_type": "qwen2",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
        },
        projector="mlp_downsample_2x2_fix",
        select_layer=-2,
        max_length=128,
    )
    model: Any = build_model(config, tokenizer).eval()
    save_model(model, build_processor(model.config, tokenizer), folder)
    return folder


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., tuple[Path, TuneData]]:
    """Write a base of some size, and open pictures of one colour each."""
    from PIL import Image

    lines = []
    for number in range(30):
        Image.new("RGB", (32, 32), COLORS[number % 3]).save(tmp_path / f"{number}.png")
        line = {"image": f"{number}.png", "question": "what color is the shape?", "answer": COLORS[number % 3]}
        lines.append(json.dumps(line))
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")

    def make(hidden: int, inner: int, layers: int) -> tuple[Path, TuneData]:
        base = write_base(tmp_path / "base", hidden, inner, layers)
        data = open_tune_data(
            Registry().open(str(tmp_path / "data.jsonl")),
            NVILAProcessor.from_pretrained(base),
            NVILAConfig.from_pretrained(base),
            tmp_path / "index",
            held_out=0.2,
        )
        return base, data

    return make


def config_of(data: TuneData, name: str, steps: int) -> TuneConfig:
    method = parse_method(name, rank=16, alpha=32.0)
    tokens = data.batch_tokens(4)
    return TuneConfig(
        method=method,
        rates=learning_rates(method, 2e-3 if method.is_adapter else 2e-5),
        batch_tokens=tokens,
        micro_batch_tokens=tokens,
        max_length=data.max_length,
        steps=steps,
        precision=PrecisionConfig(name="bf16"),
    )


def run(base: Path, data: TuneData, name: str, out: Path, steps: int) -> Tuned:
    return tune(config_of(data, name, steps), base, base_digest(base), data, out, device="cuda")


def test_qlora_learns_over_layers_of_bitsandbytes(opened: Callable[..., tuple[Path, TuneData]], tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base, data = opened(*SMALL)
    model, _ = load_base(base, config_of(data, "ln+qlora", 1), "cuda")
    kept = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(kept) == 7 * SMALL[2]
    assert all(layer.weight.dtype == torch.uint8 for layer in kept)
    tuned = run(base, data, "ln+qlora", tmp_path / "out", 40)
    assert tuned.best is not None
    assert tuned.best.loss < 0.8 * tuned.losses[0].loss
    stored = load_file(tuned.directory / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    load_model(tuned.directory)


def test_full_tuning_allocates_at_least_three_times_as_much_as_ln_with_qlora(
    opened: Callable[..., tuple[Path, TuneData]], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    base, data = opened(*LARGE)
    peaks = {}
    for name in ("full+full", "ln+qlora"):
        torch.cuda.empty_cache()
        tuned = run(base, data, name, tmp_path / name, 4)
        assert tuned.peak_bytes is not None
        peaks[name] = tuned.peak_bytes
    assert peaks["full+full"] >= 3.4 * peaks["ln+qlora"]


@pytest.mark.parametrize("name", ["full+full", "ln+lora"])
def test_the_allocators_peak_is_within_fifteen_percent_of_the_plan(
    name: str, opened: Callable[..., tuple[Path, TuneData]], tmp_path: Path
) -> None:
    base, data = opened(*LARGE)
    config = config_of(data, name, 4)
    planner = Planner(
        config=NVILAConfig.from_pretrained(base),
        data=data,
        tune=config,
        available=2**60,
        operations_per_second=1e12,
        device="cuda",
    )
    planned = planner.option(config.method, config.micro_batch_tokens).step.peak
    tuned = run(base, data, name, tmp_path / "out", 4)
    assert tuned.peak_bytes == pytest.approx(planned, rel=0.15)
