"""The training process that the launcher starts, once for every rank."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(spec_path: str) -> None:
    """Read a specification that the train step wrote and train."""
    from nvila.data.dataset import IMAGES_FILE, load_samples
    from nvila.data.media import ImageTable
    from nvila.data.records import read_jsonl
    from nvila.data.tokenizers import build_word_tokenizer
    from nvila.progress import SILENT
    from nvila.training.config import TrainConfig
    from nvila.training.interrupts import watched_signals
    from nvila.training.run import train
    from nvila_pipelines.steps.curate import texts
    from nvila_platform.s3_filesystem import data_filesystems
    from nvila_platform.settings import Settings
    from nvila_platform.telemetry import EventLog

    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    config = TrainConfig.from_dict(spec["config"])
    data = Path(spec["data"])
    datasets = {
        "selected": list(read_jsonl(Path(spec["selection"]) / "selected.jsonl")),
        "captions": load_samples(data, "captions"),
        "text": load_samples(data, "text"),
    }
    tokenizer = build_word_tokenizer(texts(datasets["text"]), model_max_length=config.model.max_length)
    images = ImageTable.open(data / IMAGES_FILE)
    # One rank reports; the others would say the same.
    reporter = EventLog(Path(spec["events"]), step="train") if os.environ.get("RANK", "0") == "0" else SILENT
    with watched_signals() as stop:
        train(
            config,
            datasets,
            images,
            tokenizer,
            Path(spec["out"]),
            reporter,
            stop=stop,
            filesystems=data_filesystems(Settings.load()),
        )


if __name__ == "__main__":
    main(sys.argv[1])
