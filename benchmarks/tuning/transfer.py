"""A transfer task for tuning: a base that knows drawn shapes (easy-VQA) is tuned on pages of handwritten digits."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from nvila.assembly import load_model
from nvila.configuration import NVILAConfig
from nvila.data import easy_vqa
from nvila.data.media import ImageTable, write_image_table
from nvila.data.mixtures import Registry
from nvila.data.tokenizers import build_word_tokenizer
from nvila.evaluation.scores import exact_match
from nvila.processing import NVILAProcessor
from nvila.training.config import CheckpointConfig, PartName, StageConfig, TrainConfig
from nvila.training.run import train
from nvila.tuning.adapters import base_digest
from nvila.tuning.answering import answer_stream
from nvila.tuning.config import TuneConfig
from nvila.tuning.data import TuneData, open_tune_data
from nvila.tuning.methods import learning_rates, parse_method
from nvila.tuning.run import tune
from nvila.tuning.splitting import Chosen
from nvila_pipelines.recipe import load_recipe

PAGES = "digit-pages-large"
# Of the three questions about a page the first: which digit is it?
QUESTIONS_A_PAGE = 3
BASE_IMAGES = 2000
# Half of what the recipe has, so that the whole table takes minutes; a digit on a page is then 20 pixels high.
TILE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One tuning.

    Args:
        method: What learns.
        rate: Rate of the language model and the projector.
        ratio: The tower learns so many times as slowly.
        seed: Of the tuning.
        steps: Optimizer steps.
    """

    method: str
    rate: float
    ratio: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Its name among the finished ones."""
        return f"{self.method}-{self.rate:g}-{self.ratio:g}-{self.seed}-{self.steps}"


def train_base(folder: Path, steps: tuple[int, int]) -> Path:
    """Train a base on easy-VQA, captions and then questions; its words include those of the pages.

    Args:
        folder: Where it goes; a base that is there is taken.
        steps: Of either stage.

    Returns:
        The folder of the model.
    """
    images = [sample for sample in easy_vqa.questions("train") if _number(sample.images[0]) < BASE_IMAGES]
    captions = list(easy_vqa.captions(images))
    pages = [record.sample for record in Registry().open(PAGES).records(stop=4000)]
    words = [text for s in (*images, *captions, *pages) if s is not None for text in (s.question, s.answer)]
    folder.mkdir(parents=True, exist_ok=True)
    keys = {sample.images[0] for sample in images}
    table = folder / "images.parquet"
    write_image_table(table, ((key, path.read_bytes()) for key, path in easy_vqa.image_files("train") if key in keys))
    model = load_recipe("fast").train_config().model
    model = replace(model, vision={**model.vision, "image_size": TILE})
    rates: dict[PartName, float] = {"vision": 2e-3, "projector": 2e-3, "language": 2e-3}
    stages = (
        StageConfig(
            name="captions", data="captions", steps=steps[0], lr=rates, images_per_step=32, warmup_steps=20,
            schedule="linear", max_shift_pixels=4,
        ),
        StageConfig(
            name="questions", data="questions", steps=steps[1], lr={**rates, "vision": 5e-4}, images_per_step=8,
            samples_per_image=8, warmup_steps=20, schedule="cosine",
        ),
    )  # fmt: skip
    config = TrainConfig(model=model, stages=stages, backend="torch", attention="eager")
    return train(
        config,
        {"captions": captions, "questions": images},
        ImageTable.open(table),
        build_word_tokenizer(words, model_max_length=model.max_length),
        folder / "train",
    )


def open_pages(base: Path, index: Path, pages: int) -> TuneData:
    """Open a question about each of the first training pages; every twentieth page is held out."""
    return open_tune_data(
        which_digit(PAGES, pages),
        NVILAProcessor.from_pretrained(base),
        NVILAConfig.from_pretrained(base),
        index,
        held_out=0.05,
    )


def which_digit(name: str, pages: int) -> Chosen:
    """Open the question of which digit is on the page, for the first pages of a part."""
    every = tuple(range(0, QUESTIONS_A_PAGE * pages, QUESTIONS_A_PAGE))
    return Chosen(Registry().open(name), f"{name}-{pages}", every)


def run_cell(base: Path, data: TuneData, work: Path, cell: Cell, pages_a_step: int, asked: int) -> dict[str, Any]:
    """Tune once and answer test questions; a cell that is finished is read, one that was interrupted goes on.

    Returns:
        Accuracy on test pages, the lowest held-out loss, and processor seconds.
    """
    done = work / "cells" / f"{cell.name}.json"
    if done.is_file():
        found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return found
    method = parse_method(cell.method, rank=32, alpha=32.0)
    tokens = pages_a_step * int(data.costs.max())
    config = TuneConfig(
        method=method,
        rates=learning_rates(method, cell.rate, ratio=cell.ratio),
        batch_tokens=tokens,
        micro_batch_tokens=tokens,
        max_length=data.max_length,
        steps=cell.steps,
        eval_every=cell.steps,
        patience=None,
        seed=cell.seed,
        checkpoints=CheckpointConfig(every_minutes=1.0),
    )
    started = time.process_time()
    tuned = tune(config, base, base_digest(base), data, work / "tuned" / cell.name)
    seconds = time.process_time() - started
    assert tuned.best is not None
    found = {"accuracy": score(tuned.directory, asked), "loss": tuned.best.loss, "seconds": round(seconds, 1)}
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def score(model_folder: Path, pages: int) -> float:
    """Return the share of so many test pages whose digit is named."""
    model, processor = load_model(model_folder)
    answered = answer_stream(model, processor, which_digit(f"{PAGES}:test", pages), limit=pages, batch_size=64)
    assert len(answered) == pages, f"only {len(answered)} of {pages} test pages exist"
    return mean(float(exact_match(one.said, one.wanted)) for one in answered)


def _number(key: str) -> int:
    return int(key.rpartition("/")[2])
