"""The training process that the launcher starts, once for every rank."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvila.data.records import Sample
    from nvila.progress import Reporter


def main(spec_path: str) -> None:
    """Read a specification that the train step wrote and train."""
    from nvila.base_models import base_tokenizer
    from nvila.data.dataset import IMAGES_FILE, VIDEOS_FILE
    from nvila.data.media import ImageTable
    from nvila.data.tokenizers import build_word_tokenizer
    from nvila.progress import SILENT
    from nvila.training.config import TrainConfig
    from nvila.training.interrupts import watched_signals
    from nvila.training.run import train
    from nvila_pipelines.steps.curate import texts
    from nvila_platform.settings import Settings
    from nvila_platform.telemetry import EventLog
    from nvila_platform.training import observe_training
    from nvila_platform.training.backup import backed_up

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
    out = Path(spec["out"])
    if os.environ.get("RANK", "0") != "0":
        # One rank reports; the others would say the same.
        with watched_signals() as stop:
            train(config, datasets, images, tokenizer, out, SILENT, videos=videos, stop=stop)
        return
    events, settings = EventLog(Path(spec["events"]), step="train"), Settings.load()
    with (
        backed_up(settings, out, events.notice),
        observe_training(config, settings, out_dir=out, reporter=events, vocabulary=len(tokenizer)) as observer,
        watched_signals() as stop,
    ):
        train(
            config, datasets, images, tokenizer, out, _Notices(events), videos=videos, observers=(observer,), stop=stop
        )


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


class _Notices:
    """Passes notices on; progress comes from the observer, which measures it."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def progress(self, phase: str, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        pass

    def notice(self, text: str) -> None:
        self._reporter.notice(text)


if __name__ == "__main__":
    main(sys.argv[1])
