"""What of the GPU benchmark runs without a GPU: its shapes, its operations, its trainings in small, and its claims."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from nvila.training.config import Fp8Config, PrecisionConfig

H100 = "NVIDIA H100 80GB HBM3"
SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "training" / "fp8_gpu.py"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("fp8_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fp8_gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fp8_gpu"]
    sys.path[:] = path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the benchmark would run")
def test_without_a_gpu_it_ends_with_one_line() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, cwd=SCRIPT.parent)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors == ["error: this benchmark needs a CUDA device and there is none; run it on a GPU machine"]


def test_gpu_without_fp8_units_is_named(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    assert "A100-SXM4-80GB has no FP8 units" in str(bench.missing())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert bench.missing() is None


def test_operations_are_those_that_torch_counts(bench: ModuleType) -> None:
    """On the meta device, at the real widths: 3584 is where the recipes begin to convert layers."""
    load = bench.Load(blocks=2, rows=2, length=512, rounds=1)
    config = bench.decoder_config(load.blocks)
    assert config.hidden_size == Fp8Config().min_features == 3584
    with torch.device("meta"):
        decoder = Qwen2Model(config)
        decoder.set_attn_implementation("eager")
        x = torch.randn(load.rows, load.length, config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        # The mask is given, since making one asks for values; products do not depend on it.
        mask = {"full_attention": None}
        decoder(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state.sum().backward()
    assert bench.operations(load) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_every_backend_is_measured_with_and_without_checkpointing(bench: ModuleType) -> None:
    cases = bench.cases(["torchao", "transformer_engine"])
    assert len({case.name for case in cases}) == len(cases) == 10
    plain = {(one.backend, one.checkpointing) for one in cases if not one.save_activations and not one.compiled}
    assert plain == {(backend, both) for backend in ("torchao", "transformer_engine") for both in (False, True)}
    assert [case.backend for case in bench.cases(bench.available())] == ["torchao"] * 6


def small(blocks: int) -> Qwen2Config:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": blocks}
    return Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=32)


def test_trainings_learn_alike(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao", reason="torchao is part of the model extra")
    monkeypatch.setattr(bench, "decoder_config", small)
    load = bench.Load(blocks=2, rows=1, length=20, rounds=1)
    fp8 = PrecisionConfig(name="fp8", fp8=Fp8Config(backend="torchao", min_features=16))
    losses = {}
    for case in (
        bench.Case(backend="torchao", checkpointing=False),
        bench.Case(backend="torchao", checkpointing=True),
        bench.Case(backend="torchao", checkpointing=True, save_activations=True),
    ):
        for precision in (PrecisionConfig(name="bf16"), fp8):
            training = bench.Training(load, case, precision, device="cpu")
            losses[case.name, precision.name] = [float(training.step()) for _ in range(3)]
    values = list(losses.values())
    assert all(found[2] < found[1] < found[0] for found in values)
    assert all(found == pytest.approx(values[0], rel=0.01) for found in values)
    assert losses["torchao-no-checkpointing", "fp8"] != losses["torchao-no-checkpointing", "bf16"]


def test_claims_are_ratios_of_the_same_rounds(bench: ModuleType) -> None:
    load = bench.Load(blocks=4, rows=4, length=4096, rounds=3)
    seconds = bench.operations(load) / (0.5 * 989e12)  # half of an H100's peak in bf16
    measured = bench.Measured(
        bf16_seconds=[seconds, 2 * seconds, seconds],
        fp8_seconds=[seconds / 1.3, 2 * seconds / 1.5, seconds / 1.45],
        bf16_bytes=3 * 2**30,
        fp8_bytes=2 * 2**30,
    )
    case = bench.Case(backend="torchao", checkpointing=False)
    found = {one.id.removeprefix(f"{case.name}-"): one for one in bench.claims(load, case, measured, H100)}
    assert list(found) == ["throughput", "memory", "bf16-mfu", "fp8-mfu"]
    speed = found["throughput"]
    assert (speed.ratio, speed.low, speed.high, speed.met) == (1.45, 1.3, 1.5, True)
    assert speed.goal == "at least 1.4"
    assert found["memory"].ratio == 1.5
    assert found["bf16-mfu"].ratio == 0.5
    # Of the median second, which is that of the first round.
    assert found["fp8-mfu"].ratio == pytest.approx(0.5 * 1.3 * 989 / 1979, abs=1e-3)
    slow = bench.Measured(bf16_seconds=[1.0], fp8_seconds=[1.0], bf16_bytes=1, fp8_bytes=1)
    assert not bench.claims(load, case, slow, H100)[0].met
    # Goals are those of training as it runs, and a GPU that the table does not know has no MFU.
    compiled = bench.Case(backend="torchao", checkpointing=False, compiled=True)
    (speed, _) = bench.claims(load, compiled, slow, "something new")
    assert (speed.goal, speed.met) == ("reported", True)
