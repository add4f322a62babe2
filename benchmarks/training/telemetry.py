"""What watching a training run costs it: step time with every observer over step time with none.

A model of the quickstart's kind trains through the real loop. Blocks of steps with all observers (progress events,
history, `/metrics` scraped every second by another process, MLflow on a real server with 100 values a step) take turns
with blocks that have none, in one run. Then the same with MLflow alone, and as many values as the server takes.

python benchmarks/training/telemetry.py              # 8 pairs of blocks
python benchmarks/training/telemetry.py --quick      # 2 pairs
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# One thread trains, so that the server has a core of its own, as it has in practice.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from bench_result import Claim, claim, write_result

from nvila.training.config import ModelConfig, StageConfig, TrainConfig
from nvila.training.observer import StageObserver, StageStart, StepRecord
from nvila_platform.settings import Settings
from nvila_platform.telemetry import EventLog
from nvila_platform.tracking import open_tracker
from nvila_platform.training import TrainingObserver, observe_training
from nvila_platform.training.meter import StageMeter
from nvila_platform.training.sinks import BaseSink, TrackingSink

BLOCK_STEPS = 20
# What the block before left behind (a batch on its way to the server) is not counted.
SETTLE_STEPS = 5
VALUES_A_STEP = 100
SCRAPER = """
import sys, time, urllib.request
while True:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/metrics", timeout=5).read()
    except OSError:
        pass
    time.sleep(1)
"""


@dataclass
class Alternating:
    """Switches another observer on and off, block by block, and times the steps of both from call to call."""

    inner: StageObserver
    seconds: dict[bool, list[list[float]]] = field(default_factory=lambda: {False: [], True: []})
    own: list[float] = field(default_factory=list)
    _last: float = 0.0

    def on_stage_start(self, start: StageStart) -> None:
        """Pass it on."""
        self.inner.on_stage_start(start)

    def on_step(self, record: StepRecord) -> None:
        """Time the step before, and pass this one on in every second block."""
        now = time.perf_counter()
        # The block that the steps before this call belonged to.
        block, place = divmod(record.step - 2, BLOCK_STEPS)
        if record.step >= 2:
            if place == 0:
                self.seconds[block % 2 == 1].append([])
            if place >= SETTLE_STEPS:
                self.seconds[block % 2 == 1][-1].append(now - self._last)
        self._last = now
        if ((record.step - 1) // BLOCK_STEPS) % 2 == 1:
            self.inner.on_step(record)
            self.own.append(time.perf_counter() - now)

    def on_notice(self, text: str) -> None:
        """Pass it on."""
        self.inner.on_notice(text)

    def on_stage_end(self, stage: str) -> None:
        """Pass it on."""
        self.inner.on_stage_end(stage)

    def ratios(self) -> list[float]:
        """Median step of each watched block over that of the bare block before it."""
        pairs = zip(self.seconds[False], self.seconds[True], strict=False)
        return [median(watched) / median(bare) for bare, watched in pairs if bare and watched]


class ManyValues(BaseSink):
    """Adds values to those that the tracker gets anyway, up to `VALUES_A_STEP`."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker

    def on_step(self, meter: StageMeter, record: StepRecord, values: Mapping[str, float]) -> None:
        """Log them."""
        rest = VALUES_A_STEP - len(values)
        self._tracker.log_metrics({f"extra/{number}": record.loss for number in range(rest)}, record.step)


def main() -> int:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 pairs of blocks")
    args = parser.parse_args()
    pairs, values = (2, 10_000) if args.quick else (8, 100_000)
    with tempfile.TemporaryDirectory() as scratch:
        claims, details = measure(Path(scratch), pairs, values)
    for one in claims:
        print(f"{one.id:<22} {one.ratio:<10} ({one.low} to {one.high})  goal: {one.goal}")
    path = write_result("training-telemetry-quick" if args.quick else "training-telemetry", claims, details)
    print(f"written: {path}")
    return 0


def measure(scratch: Path, pairs: int, values: int) -> tuple[list[Claim], dict[str, Any]]:
    """Run both trainings and the flood beside one server."""
    from nvila_platform.mlflow_ui import start_ui

    local = Settings.load(scratch / "ws", {"NVILA_PEAK_TFLOPS": "0.1"})
    with start_ui(local, port=0) as server:
        settings = replace(local, tracking_uri=server.url, track_training="direct")
        everything = train_watched(scratch / "all", settings, pairs, everything=True)
        tracked = train_watched(scratch / "mlflow", settings, pairs, everything=False)
        rate = flood(settings, values)
    notes = f"blocks of {BLOCK_STEPS} steps in turn, the first {SETTLE_STEPS} of each left out; one thread trains"
    claims = [
        ratio("step-all-observers", "step time with every observer over none", everything, 1.03, notes),
        ratio("step-mlflow", f"step time with {VALUES_A_STEP} values a step to MLflow over none", tracked, 1.02, notes),
        claim(
            "observer-microseconds",
            "time in the observers a step, microseconds",
            [second * 1e6 for second in everything.own],
            "reported",
            True,
            "in the thread that trains; MLflow, history and events all get every step",
        ),
        claim("metrics-per-second", "values a second that reach the server", [rate], "reported", True, f"{values:,}"),
    ]
    bare = [median(block) for block in everything.seconds[False] + tracked.seconds[False] if block]
    return claims, {
        "bare_step_ms": [round(1000 * second, 2) for second in bare],
        "all_ratios": [round(one, 4) for one in everything.ratios()],
        "mlflow_ratios": [round(one, 4) for one in tracked.ratios()],
    }


def ratio(name: str, what: str, watched: Alternating, goal: float, notes: str) -> Claim:
    """Build the claim of one comparison."""
    found = watched.ratios()
    return claim(name, what, found, f"at most {goal}", median(found) <= goal, notes)


def train_watched(out: Path, settings: Settings, pairs: int, *, everything: bool) -> Alternating:
    """Train for the blocks and return what was timed."""
    from nvila.training.run import train

    out.mkdir(parents=True)
    config, inputs = training(out, 2 * pairs * BLOCK_STEPS + 1)
    tokenizer = inputs["tokenizer"]
    if everything:
        settings = replace(settings, metrics_address="127.0.0.1:0")
        observer = observe_training(config, settings, out_dir=out, reporter=EventLog(out / "events.jsonl", "train"))
    else:
        observer = TrainingObserver([TrackingSink(open_tracker(settings, "train"))], settings)
    tracker = next(sink._tracker for sink in observer._sinks if isinstance(sink, TrackingSink))
    observer._sinks.append(ManyValues(tracker))
    alternating = Alternating(observer)
    port = next((sink.port for sink in observer._sinks if hasattr(sink, "port")), None)
    scraper = subprocess.Popen([sys.executable, "-c", SCRAPER, str(port)]) if port else None
    try:
        with observer:
            train(config, inputs["datasets"], inputs["images"], tokenizer, out, observers=(alternating,))
    finally:
        if scraper is not None:
            scraper.kill()
            scraper.wait()
    return alternating


def training(folder: Path, steps: int) -> tuple[TrainConfig, dict[str, Any]]:
    """Return a run of one stage over easy-VQA, a tenth of a second a step on one quiet core."""
    from nvila.data import easy_vqa
    from nvila.data.media import ImageTable, write_image_table
    from nvila.data.tokenizers import build_word_tokenizer

    samples = [sample for _, sample in zip(range(2000), easy_vqa.questions("train"), strict=False)]
    keys = {sample.images[0] for sample in samples}
    write_image_table(
        folder / "images.parquet",
        ((key, path.read_bytes()) for key, path in easy_vqa.image_files("train") if key in keys),
    )
    tokenizer = build_word_tokenizer(texts(samples), model_max_length=128)
    vision = {"model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    vision |= {"num_attention_heads": 4, "image_size": 64, "patch_size": 8, "vision_use_head": False}
    language = {"model_type": "qwen2", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    language |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    language |= {"tie_word_embeddings": True, "initializer_range": 0.08}
    model = ModelConfig(
        vision=vision, language=language, projector="mlp_downsample_2x2_fix", select_layer=-2, max_length=128
    )
    stage = StageConfig(
        name="instruct",
        data="train",
        steps=steps,
        lr={"vision": 1e-4, "projector": 1e-3, "language": 1e-3},
        images_per_step=12,
        samples_per_image=8,
        warmup_steps=10,
        schedule="cosine",
    )
    config = TrainConfig(model=model, stages=(stage,), backend="torch", attention="eager")
    images = ImageTable.open(folder / "images.parquet")
    return config, {"datasets": {"train": samples}, "images": images, "tokenizer": tokenizer}


def texts(samples: Sequence[Any]) -> list[str]:
    """Return every text of the samples, for the vocabulary."""
    from nvila_pipelines.steps.curate import texts as of

    return list(of(samples))


def flood(settings: Settings, values: int) -> float:
    """Log as fast as the caller can and return the values a second until the server has them all."""
    tracker = open_tracker(settings, "flood")
    tracker.wait_run_id(60)
    began = time.perf_counter()
    for step in range(values // VALUES_A_STEP):
        tracker.log_metrics({f"m{number}": float(step) for number in range(VALUES_A_STEP)}, step)
    tracker.close(timeout_s=600)
    return values / (time.perf_counter() - began)


if __name__ == "__main__":
    raise SystemExit(main())
