"""Small training runs in processes of their own, which tests may kill."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from nvila.data.media import ImageTable
    from nvila.training.config import ModelConfig, TrainConfig

WORKER = Path(__file__).with_name("worker.py")


RunGroup = Callable[..., "dict[str, list[Report]]"]


@dataclass(frozen=True, slots=True)
class Report:
    """What a process told about a run."""

    error: tuple[int, str] | None
    notices: list[str]
    steps: list[list[Any]]
    started: list[list[Any]]
    seen: list[list[str]]

    @classmethod
    def read(cls, path: Path) -> Report:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls(**raw | {"error": raw["error"] and tuple(raw["error"])})


class Zygote:
    """Forks a process for every job."""

    def __init__(self, here: Path) -> None:
        self._here = here
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(here)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def run(self, name: str, config: TrainConfig, out: Path, **job: Any) -> Report | int:
        """Do a job in a process; returns its report, or the signal that ended it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps({"name": name, "config": config.to_dict(), "out": str(out), **job})
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return Report.read(self._here / f"{name}.0.json") if code == 0 else code

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(120)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="session")
def training_folder(
    image_table: ImageTable, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Data, images and words of small runs."""
    from nvila.data.media import write_image_table
    from nvila.data.records import vqa_sample, write_jsonl

    here = tmp_path_factory.mktemp("training")
    questions = (("what color?", "red"), ("what shape?", "circle"), ("is there a circle?", "yes"))
    samples = [
        vqa_sample(id=f"{image}{number}", source="s", image=image, question=question, answer=answer)
        for image in "abcde"
        for number, (question, answer) in enumerate(questions)
    ]
    texts = [
        vqa_sample(id=f"text{number}", source="t", image=None, question="what color?", answer=answer)
        for number, answer in enumerate(("red", "blue", "green", "circle", "the triangle"))
    ]
    write_jsonl(here / "questions.jsonl", samples)
    write_jsonl(here / "mixed.jsonl", [*samples, *texts])
    write_image_table(here / "images.parquet", ((key, image_table.encoded(key)) for key in "abcde"))
    tokenizer.save_pretrained(here / "words")
    return here


@pytest.fixture(scope="module")
def zygote(training_folder: Path) -> Iterator[Zygote]:
    started = Zygote(training_folder)
    yield started
    started.close()


@pytest.fixture(scope="session")
def small_config(model_config: ModelConfig) -> TrainConfig:
    """Two stages of a few steps that save a checkpoint every second step."""
    from nvila.training.config import CheckpointConfig, StageConfig, TrainConfig

    rates: Any = {"vision": 1e-2, "projector": 1e-2, "language": 1e-2}
    values: dict[str, Any] = {
        "data": "questions",
        "images_per_step": 4,
        "samples_per_image": 2,
        "warmup_steps": 1,
        "schedule": "cosine",
        "max_shift_pixels": 1,
    }
    return TrainConfig(
        model=model_config,
        stages=(
            StageConfig(name="align", steps=3, lr={"projector": 1e-2}, **values),
            StageConfig(name="all", steps=7, lr=rates, **values),
        ),
        backend="torch",
        seed=5,
        checkpoints=CheckpointConfig(every_steps=2, every_minutes=None),
    )


@pytest.fixture(scope="session")
def run_group(training_folder: Path) -> RunGroup:
    """Do jobs in two processes of one group; gives the reports of both ranks by the name of the job."""

    def run(jobs: Sequence[dict[str, Any]], timeout_s: float = 150) -> dict[str, list[Report]]:
        port = _free_port()
        listing = training_folder / f"jobs-{port}.json"
        listing.write_text(json.dumps(list(jobs)), encoding="utf-8")
        processes = []
        for rank in ("0", "1"):
            launched = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
            launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            command = [sys.executable, str(WORKER), str(training_folder), str(listing)]
            processes.append(subprocess.Popen(command, env=os.environ | launched))
        try:
            assert [process.wait(timeout_s) for process in processes] == [0, 0]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return {
            job["name"]: [Report.read(training_folder / f"{job['name']}.{rank}.json") for rank in (0, 1)]
            for job in jobs
        }

    return run


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
