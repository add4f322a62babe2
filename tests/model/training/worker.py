"""A training process of the tests: it does jobs that a test hands it, breaks what the job says, and reports.

As a zygote it forks a process for every job, so that one start of torch serves many kills. As a member of a group it
does all jobs of a file with the others.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoTokenizer

import nvila.training.run as training
from nvila.data.dataset import load_samples
from nvila.data.media import ImageTable
from nvila.errors import NvilaError
from nvila.training.batches import GroupBatches, MicroBatch
from nvila.training.config import TrainConfig
from nvila.training.engine import build_engine
from nvila.training.interrupts import watched_signals
from nvila.training.observer import StageStart, StepRecord
from nvila.training.processes import barrier

Job = Mapping[str, Any]


class Recorder:
    """Remembers what a run tells; after a step it kills this process, or lets it write no larger files from then on."""

    def __init__(self, job: Job) -> None:
        self.notices: list[str] = []
        self.steps: list[list[Any]] = []
        self.started: list[list[Any]] = []
        self._kill_at = job.get("kill_at")
        self._limit_at = job.get("limit_at")

    def on_stage_start(self, start: StageStart) -> None:
        self.started.append([start.stage, start.first_step, start.world_size])

    def on_step(self, record: StepRecord) -> None:
        loss = record.loss if math.isfinite(record.loss) else None
        self.steps.append([record.stage, record.step, loss, record.skipped, record.samples])
        if self._kill_at == [record.stage, record.step]:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._limit_at and self._limit_at[:2] == [record.stage, record.step]:
            size = self._limit_at[2]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def on_notice(self, text: str) -> None:
        self.notices.append(text)

    def on_stage_end(self, stage: str) -> None:
        pass


class Batches(GroupBatches):
    """Remembers which samples this process saw, cut into several micro-batches if the job says so.

    A signal may come to the first process while it takes the data of a step.
    """

    seen: list[list[str]]
    parts: int
    signal_in: list[Any]

    def __next__(self) -> list[MicroBatch]:
        (rows,) = super().__next__()
        self.seen.append([sample.id for row in rows for sample in row])
        if len(self.seen) == self.signal_in[0] and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.Signals[self.signal_in[1]])
        if self.parts == 1:
            return [rows]
        # A number that varies from step to step.
        parts = 1 + len(self.seen) % self.parts
        size = math.ceil(len(rows) / parts)
        return [rows[start : start + size] for start in range(0, len(rows), size)]


@contextmanager
def broken(job: Job) -> Iterator[list[list[str]]]:
    """Break what the job says; gives the samples of every step."""
    seen: list[list[str]] = []
    batches = type(
        "JobBatches",
        (Batches,),
        {"seen": seen, "parts": job.get("parts", 1), "signal_in": job.get("signal_in", [0, ""])},
    )
    with ExitStack() as stack:
        stack.enter_context(patch.object(training, "GroupBatches", batches))
        if "kill_at_sync" in job:
            stack.enter_context(patch.object(os, "fsync", _killing(os.fsync, job["kill_at_sync"])))
        if job.get("poison"):
            build = build_engine
            stack.enter_context(
                patch.object(training, "build_engine", lambda *args: _poisoned(build(*args), job["poison"], seen))
            )
        yield seen


def _killing(real: Any, at: int) -> Any:
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    return fsync


def _poisoned(engine: Any, poison: Mapping[str, Any], seen: list[list[str]]) -> Any:
    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        if len(seen) not in poison["steps"] or os.environ.get("RANK", "0") != str(poison["rank"]):
            return output
        if poison["what"] == "loss":
            output.loss = output.loss + math.inf
        else:
            output.loss.register_hook(lambda gradient: gradient * math.nan)
        return output

    engine.module.register_forward_hook(spoil)
    return engine


def run_job(here: Path, job: Job) -> None:
    """Train as the job says and leave a report."""
    config = TrainConfig.from_dict(job["config"])
    data = {name: load_samples(here, name) for name in ("questions", "mixed")}
    words = AutoTokenizer.from_pretrained(here / "words")
    images = ImageTable.open(here / "images.parquet")
    recorder, error = Recorder(job), None
    if "copy_from" in job:
        if os.environ.get("RANK", "0") == "0":
            shutil.copytree(job["copy_from"], job["out"])
        barrier()
    with broken(job) as seen, watched_signals() as stop:
        try:
            training.train(config, data, images, words, Path(job["out"]), observers=[recorder], stop=stop)
        except NvilaError as e:
            error = [e.exit_code, str(e)]
        except KeyboardInterrupt:
            error = [130, "interrupted"]
    report = {
        "error": error,
        "notices": recorder.notices,
        "steps": recorder.steps,
        "started": recorder.started,
        "seen": seen,
    }
    rank = os.environ.get("RANK", "0")
    (here / f"{job['name']}.{rank}.json").write_text(json.dumps(report), encoding="utf-8")


def serve(here: Path) -> None:
    """Fork a process for every job on standard input and answer with how it ended."""
    # Libraries log to standard output; the answers have what was standard output for themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run_job(here, json.loads(line))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def main() -> None:
    torch.set_num_threads(1)
    here = Path(sys.argv[1])
    if len(sys.argv) == 2:
        serve(here)
    else:
        for job in json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")):
            run_job(here, job)


if __name__ == "__main__":
    main()
