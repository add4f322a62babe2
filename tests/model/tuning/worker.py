"""One process of a tuning of the tests: does what a file says, and may be killed on the way."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from nvila.configuration import NVILAConfig
from nvila.data.mixtures import Registry
from nvila.processing import NVILAProcessor
from nvila.training.config import CheckpointConfig
from nvila.training.observer import StageStart, StepRecord
from nvila.tuning.adapters import base_digest
from nvila.tuning.config import TuneConfig
from nvila.tuning.data import open_tune_data
from nvila.tuning.methods import learning_rates, parse_method
from nvila.tuning.run import tune


class Recorder:
    """Writes down the steps of the first process, and kills it after one of them."""

    def __init__(self, path: Path, kill_at: int | None) -> None:
        self._path, self._kill_at = path, kill_at
        self._path.write_text("", encoding="utf-8")

    def on_stage_start(self, start: StageStart) -> None:
        pass

    def on_step(self, record: StepRecord) -> None:
        with self._path.open("a", encoding="utf-8") as out:
            out.write(json.dumps([record.step, record.loss, record.grad_norm, record.samples]) + "\n")
        if record.step == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_notice(self, text: str) -> None:
        pass

    def on_stage_end(self, stage: str) -> None:
        pass


def main(path: str) -> None:
    torch.set_num_threads(1)
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    base, out = Path(job["base"]), Path(job["out"])
    config = NVILAConfig.from_pretrained(base)
    processor = NVILAProcessor.from_pretrained(base)
    data = open_tune_data(Registry().open(job["data"]), processor, config, Path(job["index"]), held_out=0.2)
    method = parse_method(job["method"], rank=8, alpha=32.0, dropout=job["dropout"])
    settings = TuneConfig(
        method=method,
        rates=learning_rates(method, 1e-3),
        batch_tokens=data.batch_tokens(8),
        micro_batch_tokens=data.batch_tokens(4),
        max_length=data.max_length,
        steps=6,
        eval_every=2,
        checkpoints=CheckpointConfig(every_steps=2, every_minutes=None),
    )
    recorder = Recorder(out.with_suffix(".steps"), job.get("kill_at"))
    tune(settings, base, base_digest(base), data, out, observers=[recorder])


if __name__ == "__main__":
    main(sys.argv[1])
