"""A few image-text samples on disk, as a user has them, and a scorer for the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from PIL import Image

    from nvila.curation.nvila_scorer import NvilaScorer
    from nvila.data.readers.record import CountedStream
    from nvila.modeling import NVILAForConditionalGeneration
    from nvila.processing import NVILAProcessor

QUESTIONS = ("what color is the shape?", "what shape is in the image?", "is there a red circle?", "describe the image.")
ANSWERS = ("red", "blue", "a red circle", "yes", "no", "the triangle", "two", "a green rectangle")


@pytest.fixture(scope="session")
def data_file(pictures: dict[str, Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    names = list(pictures)
    lines = []
    for number in range(48):
        lines.append(
            {
                "id": str(number),
                "image": f"{names[number % len(names)]}.png",
                "conversations": [
                    {"from": "human", "value": f"<image>\n{QUESTIONS[number % 4]}"},
                    {"from": "gpt", "value": ANSWERS[(number // 4) % 8]},
                ],
            }
        )
    path = folder / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def stream(data_file: Path) -> CountedStream:
    from nvila.data.readers.opening import DatasetSpec, open_dataset

    return open_dataset(DatasetSpec(path=str(data_file)))


@pytest.fixture
def scorer(fresh_model: NVILAForConditionalGeneration, processor: NVILAProcessor) -> NvilaScorer:
    """Of a model that a test may change."""
    from nvila.curation.nvila_scorer import NvilaScorer

    return NvilaScorer(fresh_model, processor)
