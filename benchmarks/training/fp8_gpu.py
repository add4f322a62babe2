"""FP8 against bf16 on a GPU: throughput, memory and MFU of decoder blocks with the widths of NVILA-8B.

Some blocks of Qwen2-7B (3584 wide, 18944 in the middle, 28 heads over 4) train on random vectors: forward, backward and
AdamW over fp32 weights, as `nvila train` does it. bf16 and FP8 take turns, so that clocks that fall hit both. Every FP8
backend of the machine is measured, with and without gradient checkpointing, and with saved activations in FP8. torchao
is also measured with every block compiled (bf16 too), since its casts are single kernels otherwise.

Needs a CUDA device with FP8 units.

python benchmarks/training/fp8_gpu.py              # 4 blocks, 4 rows of 4096 positions, 8 rounds
python benchmarks/training/fp8_gpu.py --quick      # 1 block, 1 row of 1024 positions, 2 rounds
"""

from __future__ import annotations

import argparse
import gc
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_result import Claim, claim, write_result
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from nvila.training.config import Fp8Config, PrecisionConfig
from nvila.training.flops import DecoderShape, step_operations
from nvila.training.hardware import device_name, peak_flops
from nvila.training.optimizers import build_optimizer
from nvila.training.precision import InPrecision, apply_precision, fp8_transformer_engine
from nvila.training.run import recompute_activations

Backend = Literal["torchao", "transformer_engine"]
# FP8 over bf16, without and with gradient checkpointing. NVILA's table 5 has 2.0 and 1.2, with larger batches for FP8.
GOALS = {False: 1.4, True: 1.15}
FIRST_WITH_FP8 = (8, 9)
WARM_STEPS = 3
STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much is computed in a step."""

    blocks: int
    rows: int
    length: int
    rounds: int

    @property
    def tokens(self) -> int:
        """Positions of a step."""
        return self.rows * self.length


WHOLE = Load(blocks=4, rows=4, length=4096, rounds=8)
QUICK = Load(blocks=1, rows=1, length=1024, rounds=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One FP8 training that is compared with bf16."""

    backend: Backend
    checkpointing: bool
    save_activations: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        """Name of its claims."""
        parts = [self.backend.replace("_", "-"), "checkpointing" if self.checkpointing else "no-checkpointing"]
        parts += ["saved"] * self.save_activations + ["compiled"] * self.compiled
        return "-".join(parts)

    @property
    def words(self) -> str:
        """What it is."""
        return (
            f"{self.backend}, {'with' if self.checkpointing else 'without'} gradient checkpointing"
            + ", saved activations in FP8" * self.save_activations
            + ", blocks of both compiled" * self.compiled
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was found for a case: seconds of steps by round, and the most bytes that tensors took."""

    bf16_seconds: Sequence[float]
    fp8_seconds: Sequence[float]
    bf16_bytes: int
    fp8_bytes: int


class Training:
    """Steps of one decoder on the same random batch."""

    def __init__(self, load: Load, case: Case, precision: PrecisionConfig, device: str = "cuda") -> None:
        torch.manual_seed(0)
        config = decoder_config(load.blocks)
        self.decoder = Qwen2Model(config).train()
        self.decoder.set_attn_implementation("sdpa")
        nn.Module.to(self.decoder, device)
        self.decoder.requires_grad_(False)
        self.decoder.layers.requires_grad_(True)
        apply_precision(self.decoder, precision)
        if case.checkpointing:
            recompute_activations(self.decoder)
        if case.compiled:
            for block in self.decoder.layers:
                block.compile()
        InPrecision(self.decoder, precision)
        self._x = torch.randn(load.rows, load.length, config.hidden_size, device=device)
        self._target = torch.randn_like(self._x)
        parameters = list(self.decoder.layers.parameters())
        self._optimizer = build_optimizer(
            "adamw", [{"params": parameters, "lr": 1e-5}], betas=(0.9, 0.999), weight_decay=0.0
        )

    def step(self) -> Tensor:
        """Train a step and return its loss."""
        y = self.decoder(inputs_embeds=self._x, use_cache=False).last_hidden_state
        loss = (y.float() - self._target).square().mean()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return cast("Tensor", loss.detach())


def main() -> int:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 block, 1 row, 2 rounds")
    args = parser.parse_args()
    if problem := missing():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    load = QUICK if args.quick else WHOLE
    found: list[Claim] = []
    details: dict[str, Any] = {"gpu": gpu(), "load": asdict(load)}
    for case in cases(available()):
        measured = measure(load, case)
        new = claims(load, case, measured, device_name())
        found += new
        details[case.name] = asdict(measured)
        for one in new:
            print(f"{one.id:<60} {one.ratio:<8} ({one.low} to {one.high})  goal: {one.goal}", flush=True)
    slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    print(f"written: {write_result(f'training-fp8-gpu-{slug}' + '-quick' * args.quick, found, details)}")
    return 0


def missing() -> str | None:
    """Return in one line what this machine lacks, or None."""
    if not torch.cuda.is_available():
        return "this benchmark needs a CUDA device and there is none; run it on a GPU machine"
    if torch.cuda.get_device_capability() < FIRST_WITH_FP8:
        return f"{device_name()} has no FP8 units; run it on a GPU of compute capability 8.9 or later"
    return None


def available() -> list[Backend]:
    """Return the FP8 backends of this machine."""
    backends: list[Backend] = ["torchao"]
    if fp8_transformer_engine.is_available():
        backends.append("transformer_engine")
    return backends


def cases(backends: Sequence[Backend]) -> list[Case]:
    """Return what is measured."""
    made = []
    for backend in backends:
        for checkpointing in GOALS:
            plain = Case(backend=backend, checkpointing=checkpointing)
            made += [plain, replace(plain, save_activations=True)]
            if backend == "torchao":
                made.append(replace(plain, compiled=True))
    return made


def decoder_config(blocks: int) -> Qwen2Config:
    """Return blocks of Qwen2-7B, NVILA-8B's decoder, with a small vocabulary, which no step reads."""
    return Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=blocks,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=256,
        max_position_embeddings=32768,
    )


def operations(load: Load) -> float:
    """Operations that the model asks of a step, forward and backward; computing activations again is not among them."""
    config = decoder_config(load.blocks)
    shape = DecoderShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
    )
    return step_operations({"language": shape.work(load.tokens, load.length)}, shape.head(0), ["language"])


def measure(load: Load, case: Case) -> Measured:
    """Take the memory of each training alone, then the time of both in turn."""
    fp8 = Fp8Config(backend=case.backend, save_activations=case.save_activations)
    builders: list[Callable[[], Training]] = [
        lambda: Training(load, case, PrecisionConfig(name="bf16")),
        lambda: Training(load, case, PrecisionConfig(name="fp8", fp8=fp8)),
    ]
    bf16_bytes, fp8_bytes = (peak_bytes(build) for build in builders)
    trainings = [build() for build in builders]
    for training in trainings:
        losses = [float(training.step()) for _ in range(WARM_STEPS)]
        if not all(map(math.isfinite, losses)):
            raise RuntimeError(f"{case.name}: the loss is not finite: {losses}")
    bf16_seconds, fp8_seconds = zip(
        *([seconds(training) for training in trainings] for _ in range(load.rounds)), strict=True
    )
    del trainings
    clear()
    return Measured(bf16_seconds=bf16_seconds, fp8_seconds=fp8_seconds, bf16_bytes=bf16_bytes, fp8_bytes=fp8_bytes)


def peak_bytes(build: Callable[[], Training]) -> int:
    """Return the most that tensors take while a training runs alone."""
    clear()
    training = build()
    training.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    training.step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


def seconds(training: Training) -> float:
    """Return the time of a step, a mean over some."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        training.step()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / STEPS


def clear() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    torch.cuda.empty_cache()


def claims(load: Load, case: Case, measured: Measured, device: str) -> list[Claim]:
    """Say what was found about a case."""
    faster = [bf16 / fp8 for bf16, fp8 in zip(measured.bf16_seconds, measured.fp8_seconds, strict=True)]
    # The goals are those of training as it runs: nothing is compiled there, activations are saved wide by default.
    judged = not case.compiled and not case.save_activations
    goal = GOALS[case.checkpointing]
    rates = f"{load.tokens / median(measured.bf16_seconds):.0f} and {load.tokens / median(measured.fp8_seconds):.0f}"
    made = [
        claim(
            f"{case.name}-throughput",
            f"{case.words}: tokens a second of FP8 over bf16",
            faster,
            f"at least {goal}" if judged else "reported",
            not judged or median(faster) >= goal,
            f"{load.blocks} blocks, {load.rows} rows of {load.length}; bf16 and FP8: {rates} tokens/s",
        ),
        claim(
            f"{case.name}-memory",
            f"{case.words}: peak bytes of bf16 over FP8",
            [measured.bf16_bytes / measured.fp8_bytes],
            "reported",
            True,
            f"{measured.bf16_bytes / 2**30:.2f} and {measured.fp8_bytes / 2**30:.2f} GiB, weights and AdamW included",
        ),
    ]
    for name, times in (("bf16", measured.bf16_seconds), ("fp8", measured.fp8_seconds)):
        peak = peak_flops(device, "bf16" if name == "bf16" else "fp8")
        if peak is not None:
            used = [operations(load) / second / peak for second in times]
            what = f"{case.words}: MFU of {name} against its own peak of {peak / 1e12:.0f} TFLOPS"
            made.append(claim(f"{case.name}-{name}-mfu", what, used, "reported", True))
    return made


def gpu() -> dict[str, str]:
    """Return what the GPU figures were measured on."""
    found = {"name": device_name(), "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    found["memory_gib"] = f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f}"
    for package in ("torchao", "transformer-engine", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


if __name__ == "__main__":
    raise SystemExit(main())
