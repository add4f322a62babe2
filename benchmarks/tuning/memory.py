"""Peak memory of ways to tune: counted at the shape of an 8B model, measured on models that fit, plan and measure.

Every measured cell is a process of its own that runs `nvila.tuning.run.tune` on pages of handwritten digits. Counted
bytes are those of live tensors; resident bytes are the highest RSS after the first step, over the RSS of a process that
has loaded its libraries and no model. The time of a step is the median of those whose tensors are not counted.

python benchmarks/tuning/memory.py              # twelve cells, three repeats of the two that the ratio is made of
python benchmarks/tuning/memory.py --quick      # the small model, once
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_result import claim, write_result

from nvila.configuration import NVILAConfig
from nvila.presets import preset
from nvila.training.config import PrecisionConfig
from nvila.training.observer import StageStart, StepRecord
from nvila.tuning.methods import learning_rates, parse_method
from nvila.tuning.tracing import BatchShape, TracedStep, trace_step, traced_model

METHODS = ("full+full", "ln+lora", "ln+qlora", "lora+dora", "frozen+qlora")
SIZES = {"small": (256, 704, 4), "medium": (640, 1792, 8), "large": (1280, 3584, 12)}
# The ratio is that of a model whose weights outweigh its activations, as those of an 8B model do.
RATIO_SIZE, RATIO_METHODS = "large", ("full+full", "ln+qlora")
# Steps of NVILA-Lite-8B with a batch of one, as in the paper's table 6: an image of one tile, and one of nine.
SHAPES = {
    "one tile": BatchShape(rows=1, row=273, tiles=1, supervised=60),
    "nine tiles": BatchShape(rows=1, row=1257, tiles=9, supervised=60),
}
GIB = 2**30
# Tensors of the first nine steps are counted, which takes time; those behind them are timed.
_STEPS, _TIMED_STEPS = 5, 14


def main() -> int:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small model, once")
    parser.add_argument("--no-times", action="store_true", help="leave out times of steps: on a machine that is busy")
    cell = ("SIZE", "METHOD", "FOLDER", "STEPS")
    parser.add_argument("--cell", nargs=4, metavar=cell, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.cell:
        print(json.dumps(measure(*args.cell)))
        return 0
    counted = {
        batch: {name: at_8b(name, shape) for name in ("full+full", "ln+qlora", "ln+lora")}
        for batch, shape in SHAPES.items()
    }
    sizes, repeats = (["small"], 1) if args.quick else (list(SIZES), 3)
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as folder:
        for size in sizes:
            for repeat in range(repeats):
                for method in METHODS if size != RATIO_SIZE else RATIO_METHODS:
                    if repeat and size != sizes[-1]:
                        continue
                    steps = _STEPS if repeat or args.no_times else _TIMED_STEPS
                    cells.append(run_cell(size, method, Path(folder), steps) | {"repeat": repeat})
                    print(cells[-1])
    path = write_result(
        "tuning-memory-quick" if args.quick else "tuning-memory",
        claims(counted, cells, sizes[-1]),
        {
            "at_8b": {batch: {name: plain(step) for name, step in steps.items()} for batch, steps in counted.items()},
            "cells": cells,
        },
    )
    print(f"written: {path}")
    return 0


def claims(counted: dict[str, dict[str, TracedStep]], cells: list[dict[str, Any]], largest: str) -> list[Any]:
    """Return the figures."""
    found = []
    for batch, steps in counted.items():
        full, small = steps["full+full"], steps["ln+qlora"]
        ratio = full.peak / small.peak
        found.append(
            claim(
                f"full-over-ln-qlora-8b-{batch.replace(' ', '-')}",
                f"counted peak bytes of full tuning over those of ln+qlora, NVILA-Lite-8B in bf16, an image of {batch}",
                [ratio],
                "at least 3.4",
                ratio >= 3.4,
                f"{full.peak / GIB:.1f} GiB against {small.peak / GIB:.1f} GiB, no recomputation; full tuning with "
                "fp32 weights and moments, as this project trains",
            )
        )
        parameters = full.moments // 8
        # Weights, moments and either activations or gradients.
        pure = max(8 * parameters, 6 * parameters + small.activations)
        found.append(
            claim(
                f"pure-bf16-over-ln-qlora-8b-{batch.replace(' ', '-')}",
                "the same against full tuning with weights, gradients and moments in bf16 (paper: 63.5 GB)",
                [pure / small.peak],
                "at least 3.4",
                pure / small.peak >= 3.4,
                f"{pure / GIB:.1f} GiB, of {parameters / 1e9:.2f} billion parameters"
                + ("" if pure / small.peak >= 3.4 else "; activations, equal on both sides, outweigh the weights here"),
            )
        )
    own = {
        name: [cell for cell in cells if cell["size"] == largest and cell["method"] == name] for name in RATIO_METHODS
    }
    live = [a["measured"] / b["measured"] for a, b in zip(own["full+full"], own["ln+qlora"], strict=True)]
    resident = [a["resident"] / b["resident"] for a, b in zip(own["full+full"], own["ln+qlora"], strict=True)]
    errors = [abs(cell["planned"] / cell["measured"] - 1) for cell in cells if cell["repeat"] == 0]
    timed = [cell for cell in cells if cell["seconds"] is not None]
    late = [cell["planned_seconds"] / cell["seconds"] - 1 for cell in timed]
    if timed:
        found.append(
            claim(
                "planner-time-error",
                f"planned time of a step over the measured one, less 1, over {len(late)} cells of method and size",
                late,
                "reported",
                True,
                "an estimate from operations and the speed of one matrix product; "
                + ", ".join(
                    f"{one['size']} {one['method']} {error:+.2f}" for one, error in zip(timed, late, strict=True)
                ),
            )
        )
    return [
        *found,
        claim(
            "full-over-ln-qlora-live",
            f"measured peak bytes of live tensors of full tuning over those of ln+qlora, the {largest} model in fp32",
            live,
            "at least 3.4",
            min(live) >= 3.4,
            "same model, a batch of eight samples, same data; width, inner width and layers: "
            + ", ".join(map(str, SIZES[largest])),
        ),
        claim(
            "full-over-ln-qlora-rss",
            f"highest resident memory after the first step, of the {largest} model, over that before it was loaded",
            resident,
            "at least 3.4",
            min(resident) >= 3.4,
            "as above, and what the allocator keeps and the widened weights of one layer at a time",
        ),
        claim(
            "planner-error",
            f"error of the planned peak against the measured one, over {len(errors)} cells of method and size",
            errors,
            "at most 0.15 each",
            max(errors) <= 0.15,
            "share of the measured peak",
        ),
    ]


def at_8b(name: str, shape: BatchShape) -> TracedStep:
    """Count a step of NVILA-Lite-8B on the meta device."""
    precision = PrecisionConfig(name="bf16")
    model = traced_model(NVILAConfig(**preset("nvila-lite-8b")), parse_method(name), precision)
    step = trace_step(model, shape, precision=precision, device="cuda")
    print(name, plain(step))
    return step


def plain(step: TracedStep) -> dict[str, float]:
    """Return a step's figures in GiB."""
    names = ("peak", "weights", "gradients", "moments", "activations")
    return {name: round(getattr(step, name) / GIB, 3) for name in names}


def run_cell(size: str, method: str, folder: Path, steps: int) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--cell", size, method, str(folder), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class HighWater:
    """Forgets the highest RSS after the first step."""

    def on_stage_start(self, start: StageStart) -> None:
        """Nothing yet."""

    def on_step(self, record: StepRecord) -> None:
        """Give free memory back, and start to look."""
        if record.step == 1:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")

    def on_notice(self, text: str) -> None:
        """Nothing to do."""

    def on_stage_end(self, stage: str) -> None:
        """Nothing to do."""


def measure(size: str, name: str, folder: str, steps: str) -> dict[str, Any]:
    """Plan a run and do it."""
    from nvila.data.mixtures import Registry
    from nvila.processing import NVILAProcessor
    from nvila.tuning.adapters import base_digest
    from nvila.tuning.applying import import_peft
    from nvila.tuning.config import TuneConfig
    from nvila.tuning.data import open_tune_data
    from nvila.tuning.planner import Planner, device_speed
    from nvila.tuning.run import tune

    base = Path(folder) / size
    if not base.is_dir():
        build(base, *SIZES[size])
    config = NVILAConfig.from_pretrained(base)
    data = open_tune_data(
        Registry().open("digits-vqa"), NVILAProcessor.from_pretrained(base), config, Path(folder) / "index", held_out=0
    )
    method = parse_method(name, rank=16)
    tokens = data.batch_tokens(8)
    settings = TuneConfig(
        method=method,
        rates=learning_rates(method, 1e-4),
        batch_tokens=tokens,
        micro_batch_tokens=tokens,
        max_length=data.max_length,
        steps=int(steps),
    )
    speed = device_speed("cpu", "fp32")
    planner = Planner(config=config, data=data, tune=settings, available=2**60, operations_per_second=speed)
    planned = planner.option(method)
    import_peft()
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as out:
        tuned = tune(settings, base, base_digest(base), data, Path(out), observers=[HighWater()])
    assert tuned.peak_bytes is not None
    return {
        "size": size,
        "method": name,
        "planned": planned.step.peak,
        "measured": tuned.peak_bytes,
        "planned_seconds": planned.seconds,
        "seconds": tuned.step_seconds,
        "resident": resident("VmHWM") - before,
    }


def build(base: Path, hidden: int, inner: int, layers: int) -> None:
    """Write a new model of some width and depth."""
    from nvila.assembly import build_model, build_processor, save_model
    from nvila.data.mixtures import Registry
    from nvila.data.tokenizers import build_word_tokenizer
    from nvila.training.config import ModelConfig

    samples = [record.sample for record in Registry().open("digits-vqa").records(stop=2000)]
    words = [text for sample in samples if sample is not None for text in (sample.question, sample.answer)]
    model = ModelConfig(
        vision={
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 64,
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
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        },
        projector="mlp_downsample_2x2_fix",
        select_layer=-2,
        max_length=128,
    )
    tokenizer = build_word_tokenizer(words, model_max_length=128)
    torch.manual_seed(0)
    made = build_model(model, tokenizer)
    save_model(made, build_processor(cast("NVILAConfig", made.config), tokenizer), base)


def resident(name: str) -> int:
    """Return a figure of this process's memory in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    raise SystemExit(main())
