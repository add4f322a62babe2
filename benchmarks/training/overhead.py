"""What watching and saving a training run costs, and what DeepSpeed costs against plain torch in one process.

Steps of the quickstart's last stage (its model, its rows, noise for pictures) run in turn in a bare loop (collate,
forward, backward, optimizer) and in the training loop with metrics, health checks and observers. Processor time of one
thread is compared, so that a busy machine counts little. A checkpoint is timed by the clock, writing and syncing
included, and its share of the default interval is added.

python benchmarks/training/overhead.py
python benchmarks/training/overhead.py --quick
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_result import Claim, claim, write_result

from nvila.assembly import build_model
from nvila.data.collation import collate
from nvila.data.conversation import ConversationEncoder
from nvila.data.records import vqa_sample
from nvila.data.tensors import PixelCache
from nvila.data.tokenizers import build_word_tokenizer
from nvila.training.batches import MicroBatch
from nvila.training.checkpoints import Checkpoints
from nvila.training.config import CheckpointConfig, TrainConfig
from nvila.training.engine import TrainEngine, build_engine
from nvila.training.loop import StageLoop, model_inputs
from nvila.training.metrics import MetricsLog
from nvila.training.run import trained_parts
from nvila_pipelines.recipe import load_recipe

_ZERO_STAGES = (0, 1, 2, 3)


class Rows:
    """Gives the same rows in every step."""

    def __init__(self, rows: MicroBatch) -> None:
        self.rows = rows

    def __next__(self) -> list[MicroBatch]:
        """Return one micro-batch."""
        return [self.rows]

    def state_dict(self) -> dict[str, Any]:
        """There is no position."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no position."""


class Bench:
    """Model, data and engines of the quickstart's last stage."""

    def __init__(self, steps: int) -> None:
        config = load_recipe("quickstart").train_config()
        stage = replace(config.stages[-1], steps=steps, warmup_steps=0)
        self.config: TrainConfig = replace(config, stages=(stage,), backend="torch", zero_stage=0)
        self.stage = stage
        words = ["what color is the shape? what shape is in the image? is there a red circle? red blue yes no"]
        tokenizer = build_word_tokenizer(words, model_max_length=config.model.max_length)
        torch.manual_seed(0)
        self.model = build_model(config.model, tokenizer).train()
        self.model.set_attn_implementation(config.attention)
        encoder = ConversationEncoder(tokenizer, self.model.config.num_image_tokens, config.model.max_length)
        size = config.model.vision["image_size"]
        keys = [str(number) for number in range(stage.images_per_step)]
        self.pixels = PixelCache({key: torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for key in keys})
        questions = [("what color is the shape?", "red"), ("is there a red circle?", "no")] * stage.samples_per_image
        self.rows = [
            [
                encoder(vqa_sample(id=f"{key}-{n}", source="s", image=key, question=question, answer=answer))
                for n, (question, answer) in enumerate(questions[: stage.samples_per_image])
            ]
            for key in keys
        ]
        self.pad = int(self.model.config.text_config.pad_token_id)

    def engine(self, backend: Any, zero_stage: int) -> TrainEngine:
        """Build a backend over a copy of the model."""
        model = copy.deepcopy(self.model)
        config = replace(self.config, backend=backend, zero_stage=zero_stage)
        return build_engine(model, trained_parts(model, self.stage), config)

    def bare(self, engine: TrainEngine) -> None:
        """Run the steps of the stage and look at nothing."""
        for _ in range(self.stage.steps):
            batch = collate(self.rows, self.pad)
            loss = engine(**model_inputs(batch, self.pixels.tensors(batch.images, ()))).loss
            engine.backward(loss)
            engine.step(1e-3)

    def watched(self, engine: TrainEngine, folder: Path) -> None:
        """Run the steps of the stage in the training loop."""
        loop = StageLoop(
            engine=engine,
            batches=Rows(self.rows),
            pixels=self.pixels,
            stage=replace(self.stage, max_shift_pixels=0),
            config=self.config,
            pad_token_id=self.pad,
            log=MetricsLog(folder / "metrics.jsonl"),
            checkpoints=Checkpoints(folder / "checkpoints", self.config, self.stage, print),
            skipped_path=folder / "skipped.jsonl",
        )
        loop.run()

    def save_seconds(self, engine: TrainEngine, folder: Path) -> float:
        """Return the time of one checkpoint on the disk."""
        checkpoints = Checkpoints(folder / "timed", self.config, self.stage, print)
        begin = time.perf_counter()
        if not checkpoints.save(1, engine, torch.Generator(), {"tokens": 0, "samples": 0}):
            raise SystemExit("the checkpoint could not be written")
        seconds = time.perf_counter() - begin
        shutil.rmtree(folder / "timed")
        return seconds


def main() -> int:
    """Run, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats")
    args = parser.parse_args()
    repeats, steps = (3, 10) if args.quick else (15, 40)
    torch.set_num_threads(1)
    # What a launcher sets for one process; DeepSpeed asks for it.
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    bench = Bench(steps)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        overhead, details = measure_watching(bench, Path(scratch), repeats)
    claims = [overhead]
    for zero_stage in _ZERO_STAGES:
        claims.append(measure_deepspeed(bench, zero_stage, repeats, details))
    for found in claims:
        print(f"{found.id}: {found.ratio:.3f} ({found.low:.3f} to {found.high:.3f}), {found.goal}", flush=True)
    print(f"written: {write_result('training-overhead-quick' if args.quick else 'training-overhead', claims, details)}")
    torch.distributed.destroy_process_group()
    return 0


def measure_watching(bench: Bench, folder: Path, repeats: int) -> tuple[Claim, dict[str, Any]]:
    """Compare the training loop with a bare one."""
    engine = bench.engine("torch", 0)
    bench.bare(engine)
    pairs = [
        (processor_time(lambda: bench.bare(engine)), processor_time(lambda: bench.watched(engine, folder)))
        for _ in range(repeats)
    ]
    saves = [bench.save_seconds(engine, folder) for _ in range(3)]
    engine.close()
    minutes = CheckpointConfig().every_minutes
    assert minutes is not None
    share = max(saves) / (60 * minutes)
    ratios = [watched / bare + share for bare, watched in pairs]
    parameters = sum(p.numel() for p in bench.model.parameters())
    found = claim(
        "watched-step",
        "time of a step with metrics, health checks and checkpoints at the default interval over that of a bare step",
        ratios,
        "at most 1.03",
        median(ratios) <= 1.03,
        f"{parameters:,} parameters, {1000 * median(bare for bare, _ in pairs) / bench.stage.steps:.1f} ms a bare "
        f"step; a checkpoint takes {max(saves):.2f} s every {minutes:.0f} minutes",
    )
    return found, {
        "steps": bench.stage.steps,
        "seconds": [[round(s, 4) for s in pair] for pair in pairs],
        "saves": saves,
    }


def measure_deepspeed(bench: Bench, zero_stage: int, repeats: int, details: dict[str, Any]) -> Claim:
    """Compare DeepSpeed in one process with plain torch."""
    engines = bench.engine("torch", 0), bench.engine("deepspeed", zero_stage)
    for engine in engines:
        bench.bare(engine)
    pairs = [
        (processor_time(lambda: bench.bare(engines[0])), processor_time(lambda: bench.bare(engines[1])))
        for _ in range(repeats)
    ]
    for engine in engines:
        engine.close()
    details[f"zero-{zero_stage}"] = [[round(s, 4) for s in pair] for pair in pairs]
    ratios = [ours / plain for plain, ours in pairs]
    what = f"time of a step with DeepSpeed ZeRO {zero_stage} over plain torch, one process"
    return claim(
        f"deepspeed-zero-{zero_stage}", what, ratios, "reported", True, "small tensors: the cost is per tensor"
    )


def processor_time(work: Callable[[], None]) -> float:
    """Return the processor time of this process that something takes."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


if __name__ == "__main__":
    raise SystemExit(main())
