"""Which method fits into how much memory, and how long a step takes; no weights are read."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nvila.data.media_tiles import MediaReader
from nvila.data.sample_encoding import SampleEncoder
from nvila.errors import ResourceError
from nvila.losses import IGNORE_INDEX
from nvila.progress import SILENT, Reporter
from nvila.training.planning.devices import GIB
from nvila.training.planning.memory import query_width
from nvila.training.planning.sizes import meta_model
from nvila.tuning.config import TuneConfig
from nvila.tuning.data import TuneData, largest_pass
from nvila.tuning.methods import TuneMethod, parse_method
from nvila.tuning.tracing import BatchShape, TracedStep, trace_step, traced_model

# What a plan compares (paper, table 6), and in which order it picks: the recommended ones first.
COMPARED = ("ln+lora", "ln+qlora", "lora+lora", "lora+qlora", "ln+dora", "frozen+lora", "frozen+qlora", "full+full")
PICKED = ("ln+lora", "ln+qlora", "frozen+qlora")
# Of a GPU: context and libraries, and what the allocator cannot use.
_GPU_RESERVE = GIB
# Table 6: 4.5 steps a second with LoRA, 3.1 with QLoRA.
_FOUR_BIT_COST = 1.45
# Of the speed of one large product, what a whole step reaches.
_CPU_SHARE = 0.5
_GPU_SHARE = 0.35


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A way to run a method.

    Args:
        method: The method.
        micro_batch_tokens: Positions of a forward pass.
        checkpointing: Whether activations are computed again.
        step: Its bytes.
        available: Bytes that there are.
        seconds: Of a step, about.
    """

    method: TuneMethod
    micro_batch_tokens: int
    checkpointing: bool
    step: TracedStep
    available: int
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether there is so much memory."""
        return self.step.peak <= self.available

    @property
    def why(self) -> str:
        """Why it does not fit: what takes the most; empty where it does."""
        if self.fits:
            return ""
        kinds = {
            "weights": self.step.weights,
            "gradients and moments": self.step.gradients + self.step.moments,
            "activations": self.step.activations,
        }
        largest = max(kinds, key=kinds.__getitem__)
        over = self.step.peak - self.available
        return f"{size_text(over)} too much, {size_text(kinds[largest])} are {largest}"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "method": self.method.name,
            "micro_batch_tokens": self.micro_batch_tokens,
            "gradient_checkpointing": self.checkpointing,
            "peak": self.step.peak,
            "weights": self.step.weights,
            "gradients": self.step.gradients,
            "moments": self.step.moments,
            "activations": self.step.activations,
            "available": self.available,
            "fits": self.fits,
            "why": self.why,
            "seconds_per_step": self.seconds,
        }


@dataclass(slots=True, kw_only=True)
class Planner:
    """Plans runs over one data set.

    Args:
        config: The model's configuration.
        data: The data.
        tune: Settings of the run, its method aside.
        available: Bytes of memory.
        operations_per_second: Speed of the device in a whole step.
        device: Where the run is to be.
        processes: Processes that share a step; memory and speed are those of one.
    """

    config: Any
    data: TuneData
    tune: TuneConfig
    available: int
    operations_per_second: float
    device: str = "cpu"
    processes: int = 1

    def option(self, method: TuneMethod, micro: int | None = None, *, checkpointing: bool = False) -> Option:
        """Trace one way to run a method."""
        tune = replace(self.tune, method=method, rates=dict.fromkeys(method.parts, 1e-4))
        tune = replace(tune, micro_batch_tokens=micro or next(self._micro_batches()))
        shape = self.shape(tune)
        step = trace_step(
            traced_model(self.config, method, tune.precision),
            shape,
            precision=tune.precision,
            attention=tune.attention,
            checkpointing=checkpointing,
            device=self.device,
        )
        work = step_operations(self.config, method, shape, checkpointing=checkpointing)
        seconds = work * shape.micro_batches / self.operations_per_second
        return Option(
            method=method,
            micro_batch_tokens=tune.micro_batch_tokens,
            checkpointing=checkpointing,
            step=step,
            available=self.available,
            seconds=seconds,
        )

    def shape(self, tune: TuneConfig) -> BatchShape:
        """Return the largest forward pass of a run."""
        found = largest_pass(self.data, tune, self.processes)
        return BatchShape(
            rows=found.rows,
            row=found.row,
            tiles=found.tiles,
            supervised=math.ceil(found.samples * self._supervised()),
            span=found.span if self.data.budget(tune).flat else None,
            micro_batches=max(1, math.ceil(tune.batch_tokens / (self.processes * tune.micro_batch_tokens))),
        )

    def best(self, method: TuneMethod, checkpointing: bool | None = None) -> Option:
        """Return the fastest way to run a method that fits; where none does, the smallest.

        Larger forward passes are faster than computing activations again.

        Args:
            method: The method.
            checkpointing: Fixes whether activations are computed again; None leaves it to the plan.
        """
        last: Option | None = None
        for again in (False, True) if checkpointing is None else (checkpointing,):
            for micro in self._micro_batches():
                last = self.option(method, micro, checkpointing=again)
                if last.fits:
                    return last
        assert last is not None
        return last

    def compare(self, methods: Sequence[str] = COMPARED, reporter: Reporter = SILENT) -> list[Option]:
        """Plan several methods with the rank and the other numbers of the run's own."""
        own = self.tune.method
        found = []
        for number, name in enumerate(methods):
            reporter.progress("plan", number, len(methods))
            method = parse_method(name, rank=own.rank, alpha=own.alpha, dropout=own.dropout, only=own.only)
            found.append(self.best(method))
        reporter.progress("plan", len(methods), len(methods))
        return found

    def _micro_batches(self) -> Iterator[int]:
        least = int(self.data.costs.max())
        if self.tune.samples_per_image > 1:
            least = max(least, self.data.max_length)
        micro = self.tune.batch_tokens // self.processes
        while micro > least:
            yield micro
            micro //= 4
        yield min(least, self.tune.batch_tokens)

    def _supervised(self) -> float:
        """Learned positions of a sample on average, by the first ones."""
        processor = self.data.processor
        encoder = SampleEncoder(processor.tokenizer, MediaReader(processor), self.data.max_length)
        counts = []
        for number in range(min(32, len(self.data.store))):
            stored = self.data.store[number]
            labels = encoder(stored.sample, stored.sizes).labels
            counts.append(sum(label != IGNORE_INDEX for label in labels))
        return sum(counts) / len(counts)


def pick(options: Sequence[Option]) -> Option | None:
    """Return the first of the recommended methods that fits, else any other that does."""
    fitting = [option for option in options if option.fits]
    names = [parse_method(name).name for name in PICKED]

    def place(option: Option) -> tuple[int, float]:
        return (names.index(option.method.name) if option.method.name in names else len(names), option.seconds)

    return min(fitting, key=place, default=None)


def check_fits(option: Option) -> None:
    """Refuse a run that does not fit, before anything is loaded.

    Raises:
        ResourceError: With what it needs, and what needs less.
    """
    if option.fits:
        return
    qlora = "--method ln+qlora, " if option.method.language not in ("qlora", "frozen") else ""
    raise ResourceError(
        f"{option.method.name} needs {size_text(option.step.peak)} even with the smallest batches, "
        f"{size_text(option.available)} are there: {option.why}",
        f"use {qlora}a smaller --max-length, or more --memory; nvila plan compares the methods",
    )


def size_text(size: int) -> str:
    """Return bytes for people.

    Example:
        >>> size_text(3 * 2**30), size_text(5 * 2**20)
        ('3.00 GiB', '5.0 MiB')
    """
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def step_operations(config: Any, method: TuneMethod, shape: BatchShape, *, checkpointing: bool = False) -> float:
    """Count the operations of one forward and backward pass, as `nvila.training.flops` does.

    Weights that are frozen pass gradients on and have none of their own; LoRA's matrices are left out.
    """
    model = meta_model(config)
    tower, text = config.vision_config, config.text_config
    patches = (config.tile_size // tower.patch_size) ** 2
    blocks = model.model.vision_tower.encoder.layers[: config.num_vision_blocks]
    work = {
        "vision": (_weights(blocks), shape.tiles * patches, config.num_vision_blocks * patches * tower.hidden_size),
        "projector": (_weights(model.model.mm_projector), shape.tiles * config.num_image_tokens, 0),
        "language": (
            _weights(model.model.language_model),
            shape.rows * shape.row,
            text.num_hidden_layers * (shape.span or shape.row) * query_width(config),
        ),
    }
    flows = {
        "vision": method.vision != "frozen",
        "projector": method.vision != "frozen" or method.projector == "full",
        "language": True,
    }
    total = 0.0
    for part, (weights, positions, attention) in work.items():
        linear, around = 2.0 * weights * positions, 4.0 * attention * positions
        if part == "language" and method.language == "qlora":
            linear *= _FOUR_BIT_COST
        total += linear + around
        if flows[part]:
            total += linear + 2 * around + (linear if getattr(method, part) == "full" else 0.0)
            total += linear + around if checkpointing and part != "projector" else 0.0
    head = 2.0 * text.hidden_size * text.vocab_size * shape.supervised
    return float(total + head * (3 if method.language == "full" else 2))


def available_memory(device: str) -> int:
    """Return the bytes that a run may take on this machine."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(0).total_memory) - _GPU_RESERVE
    from pathlib import Path

    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**62


def device_speed(device: str, precision: str) -> float:
    """Return the operations a second that steps reach here: measured on a CPU, by the data sheet of a GPU."""
    if device.startswith("cuda"):
        from nvila.training.hardware import device_name, peak_of

        peak = peak_of(device_name())
        return _GPU_SHARE * 1e12 * (peak.bf16 if peak is not None else 100.0)
    size = 384
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    seconds: list[float] = []
    for _ in range(5):
        begin = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begin)
    return _CPU_SHARE * 2.0 * float(size**3) / min(seconds)


def _weights(module: torch.nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d))
