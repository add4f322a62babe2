from __future__ import annotations

import itertools
from typing import Any

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nvila.configuration import NVILAConfig
from nvila.data.collation import collate
from nvila.data.conversation import ConversationEncoder
from nvila.data.records import vqa_sample
from nvila.data.tensors import PixelCache
from nvila.errors import CapabilityError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.training.config import PARTS, PartName, StageConfig
from nvila.training.flops import DecoderShape, model_flops
from nvila.training.hardware import PEAKS, memory_bytes, peak_flops
from nvila.training.loop import model_inputs
from nvila.training.observer import StepRecord
from nvila.training.planning.devices import gpu_named
from nvila.training.run import trained_parts
from nvila.training.throughput import Throughput

SUBSETS: list[tuple[PartName, ...]] = [subset for count in (1, 2, 3) for subset in itertools.combinations(PARTS, count)]


def record(step: int = 1, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "stage": "align", "step": step, "steps": 100, "loss": 1.0, "grad_norm": 0.5, "lr_scale": 1.0, "tokens": 1000,
        "samples": 10, "images": 5, "seconds": 0.5, "data_seconds": 0.1,
    }  # fmt: skip
    return StepRecord(**(values | changes))


@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_formula_agrees_with_counted_operations(
    parts: tuple[PartName, ...],
    fresh_model: NVILAForConditionalGeneration,
    encoder: ConversationEncoder,
    tiles: PixelCache,
) -> None:
    """Within 2 %: torch counts every matrix product of a real step; rows are of one length, so nothing is padding."""
    samples = [
        encoder(vqa_sample(id=key, source="s", image=key, question="what color is the shape?", answer="red"))
        for key in "ab"
    ]
    batch = collate([[sample] for sample in samples], 0)
    fresh_model.set_attn_implementation("eager")
    rates = dict.fromkeys(parts, 1e-3)
    stage = StageConfig(
        name="s", data="d", steps=1, lr=rates, images_per_step=2, samples_per_image=1, warmup_steps=0, schedule="linear"
    )
    trained_parts(fresh_model, stage)
    with FlopCounterMode(display=False) as counter:
        fresh_model(**model_inputs(batch, tiles.tensors(batch.images, ()))).loss.backward()
    length = batch.input_ids.shape[1]
    assert batch.num_tokens == 2 * length
    found = model_flops(fresh_model.config).step(
        parts, tokens=batch.num_tokens, tiles=2, context=length, supervised=batch.num_supervised
    )
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_published_decoder_costs_what_its_parameters_say() -> None:
    """Qwen2-7B: 6.5 billion parameters in the blocks' matrices, two operations each."""
    flops = model_flops(NVILAConfig.from_preset("nvila-8b"))
    assert flops.decoder.weights == pytest.approx(6.525e9, rel=0.001)
    assert flops.decoder.head(1).forward == 2 * 3584 * flops.decoder.vocabulary
    token = flops.decoder.work(1, context=4096)
    assert token.forward - token.linear == 4 * 28 * 3584 * 4096
    # SigLIP-SO400M at 448 pixels: 1024 tokens, 26 of 27 blocks.
    assert (flops.tower.tokens, flops.tower.blocks) == (1024, 26)
    assert flops.step(["language"], tokens=0, tiles=1, context=0) == pytest.approx(0.97e12, rel=0.05)


def test_hand_worked_decoder() -> None:
    shape = DecoderShape(layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4, vocabulary=10)
    # q, k, v, o: 64 + 32 + 32 + 64; gate, up, down: 3 * 128.
    assert shape.weights == 2 * (192 + 384)
    work = shape.work(3, context=5)
    assert work.linear == 2 * 3 * 2 * (192 + 384)
    assert work.forward == work.linear + 3 * 4 * 2 * 8 * 5


def test_unknown_kind_of_decoder_is_named() -> None:
    config = NVILAConfig(text_config={"model_type": "gpt2"})
    with pytest.raises(CapabilityError, match=r"decoder of type 'gpt2'.*qwen2"):
        model_flops(config)


@pytest.mark.parametrize(
    ("device", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp8", 1979),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("AMD EPYC", "bf16", None),
        ("", "bf16", None),
    ],
)
def test_peak_by_device_name(device: str, precision: Any, tera: float | None) -> None:
    assert peak_flops(device, precision) == (None if tera is None else tera * 1e12)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_a_plan_and_a_run_measure_against_the_same_peak(device: str, name: str) -> None:
    gpu = gpu_named(name)
    fp8 = None if gpu.peak.fp8 is None else gpu.peak.fp8 * 1e12
    assert (peak_flops(device, "bf16"), peak_flops(device, "fp8")) == (gpu.peak.bf16 * 1e12, fp8)


def test_projector_behind_merged_scales_is_left_out() -> None:
    assert model_flops(NVILAConfig.from_preset("nvila-8b")).projected_per_tile == 0
    assert model_flops(NVILAConfig.from_preset("nvila-lite-8b")).projected_per_tile == 121


def test_fp8_is_twice_as_fast_where_there_is_any() -> None:
    assert all(peak.fp8 is None or peak.fp8 == pytest.approx(2 * peak.bf16, rel=0.02) for peak in PEAKS.values())


def test_memory_is_what_the_process_holds() -> None:
    held = torch.ones(32 * 2**20 // 4, device="cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        assert memory_bytes() >= held.nbytes
    else:
        assert memory_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)


def test_speed_is_a_mean_over_the_window() -> None:
    meter = Throughput(peak_flops=1e6, window=2)
    assert meter.speed(10) is None
    meter.add(record(1, seconds=100.0, data_seconds=0.0), flops=1e9)
    for step in (2, 3):
        meter.add(record(step), flops=1e5)
    speed = meter.speed(steps_left=97)
    assert speed is not None
    assert speed.tokens_per_second == pytest.approx(2000)
    assert speed.samples_per_second == pytest.approx(20)
    assert speed.images_per_second == pytest.approx(10)
    assert speed.data_share == pytest.approx(0.2)
    assert speed.seconds_left == pytest.approx(48.5)
    assert speed.mfu == pytest.approx(0.2)


@pytest.mark.parametrize(("peak", "flops"), [(None, 1e5), (1e6, 0.0)])
def test_mfu_is_not_invented(peak: float | None, flops: float) -> None:
    meter = Throughput(peak_flops=peak)
    meter.add(record(), flops=flops)
    speed = meter.speed(1)
    assert speed is not None
    assert speed.mfu is None


def test_steps_without_time_have_no_speed() -> None:
    meter = Throughput()
    meter.add(record(seconds=0.0))
    assert meter.speed(1) is None
