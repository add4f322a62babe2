"""A base on disk, and coloured pictures to tune it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nvila.processing import NVILAProcessor
    from nvila.tuning.data import TuneData

COLORS = ("red", "blue", "green")


@pytest.fixture(scope="session")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file with sixty questions about plain pictures, two on each picture."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("colors")
    lines = []
    for number in range(30):
        color = COLORS[number % 3]
        Image.new("RGB", (32, 32), color).save(folder / f"{number}.png")
        for question, answer in (("what color is the shape?", color), ("is there a red circle?", "no")):
            lines.append(json.dumps({"image": f"{number}.png", "question": question, "answer": answer}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


@pytest.fixture
def color_data(colors: Path, saved_model: Path, processor: NVILAProcessor, tmp_path: Path) -> TuneData:
    from nvila.configuration import NVILAConfig
    from nvila.data.mixtures import Registry
    from nvila.tuning.data import open_tune_data

    config = NVILAConfig.from_pretrained(saved_model)
    return open_tune_data(Registry().open(str(colors)), processor, config, tmp_path / "index", held_out=0.2)
