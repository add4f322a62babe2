"""The training process that the launcher starts, once for every rank."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvila.data.records import Sample


def main(spec_path: str) -> None:
    """Read a specification that the train step wrote and train."""
    from nvila.base_models import base_tokenizer
    from nvila.data.dataset import IMAGES_FILE, VIDEOS_FILE
    from nvila.data.media import ImageTable
    from nvila.data.tokenizers import build_word_tokenizer
    from nvila.progress import SILENT
    from nvila.training.config import TrainConfig
    from nvila.training.run import train
    from nvila_pipelines.steps.curate import texts
    from nvila_platform.telemetry import EventLog

    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    config = TrainConfig.from_dict(spec["config"])
    data = Path(spec["data"])
    datasets = _datasets(data, Path(spec["selection"]))
    if config.model.base is not None:
        tokenizer = base_tokenizer(config.model.base)
    else:
        words = [text for name in ("text", "clips") for text in texts(datasets.get(name, []))]
        tokenizer = build_word_tokenizer(words, model_max_length=config.model.max_length)
    images = ImageTable.open(data / IMAGES_FILE)
    videos = ImageTable.open(data / VIDEOS_FILE) if (data / VIDEOS_FILE).is_file() else None
    # One rank reports; the others would say the same.
    reporter = EventLog(Path(spec["events"]), step="train") if os.environ.get("RANK", "0") == "0" else SILENT
    train(config, datasets, images, tokenizer, Path(spec["out"]), reporter, videos=videos)


def _datasets(data: Path, selection: Path) -> dict[str, list[Sample]]:
    """Read the samples that stages may name."""
    from nvila.data.dataset import VIDEOS_FILE, load_samples
    from nvila.data.records import read_jsonl

    datasets = {
        "selected": list(read_jsonl(selection / "selected.jsonl")),
        "captions": load_samples(data, "captions"),
        "text": load_samples(data, "text"),
    }
    return datasets | ({"clips": load_samples(data, "clips")} if (data / VIDEOS_FILE).is_file() else {})


if __name__ == "__main__":
    main(sys.argv[1])
