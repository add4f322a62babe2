"""The training process that the launcher starts, once for every rank."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nvila.data.records import Sample
    from nvila.progress import Reporter
    from nvila.training.config import TrainConfig
    from nvila.training.media import MediaTable


def main(spec_path: str) -> None:
    """Read a specification that the train step wrote and train."""
    from nvila.progress import SILENT
    from nvila.training.config import TrainConfig
    from nvila.training.interrupts import watched_signals
    from nvila.training.run import train
    from nvila_platform.settings import Settings
    from nvila_platform.telemetry import EventLog
    from nvila_platform.training import observe_training
    from nvila_platform.training.backup import backed_up

    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    config = TrainConfig.from_dict(spec["config"])
    data, selection, out = Path(spec["data"]), Path(spec["selection"]), Path(spec["out"])
    if os.environ.get("RANK", "0") != "0":
        # One rank reports; the others would say the same.
        datasets, images, videos = _data(config, data, selection, SILENT)
        with watched_signals() as stop:
            train(config, datasets, images, _tokenizer(config, datasets), out, SILENT, videos=videos, stop=stop)
        return
    events, settings = EventLog(Path(spec["events"]), step="train"), Settings.load()
    datasets, images, videos = _data(config, data, selection, events)
    tokenizer = _tokenizer(config, datasets)
    with (
        backed_up(settings, out, events.notice),
        observe_training(config, settings, out_dir=out, reporter=events) as observer,
        watched_signals() as stop,
    ):
        train(
            config, datasets, images, tokenizer, out, _Notices(events), videos=videos, observers=(observer,), stop=stop
        )


def _data(
    config: TrainConfig, data: Path, selection: Path, reporter: Reporter
) -> tuple[Mapping[str, Sequence[Sample]], MediaTable, MediaTable | None]:
    """Read the samples that stages name, and open their images and videos."""
    from nvila.data.dataset import IMAGES_FILE, VIDEOS_FILE, load_samples
    from nvila.data.media import ImageTable
    from nvila.data.records import read_jsonl
    from nvila_pipelines.training.mixtures import REGISTRY_FILE, read_mixtures

    if (data / REGISTRY_FILE).is_file():
        mixtures, media = read_mixtures([stage.data for stage in config.stages], data, reporter)
        return mixtures, media, media
    datasets = {
        "selected": list(read_jsonl(selection / "selected.jsonl")),
        "captions": load_samples(data, "captions"),
        "text": load_samples(data, "text"),
    }
    images = ImageTable.open(data / IMAGES_FILE)
    if not (data / VIDEOS_FILE).is_file():
        return datasets, images, None
    return datasets | {"clips": load_samples(data, "clips")}, images, ImageTable.open(data / VIDEOS_FILE)


def _tokenizer(config: TrainConfig, datasets: Mapping[str, Sequence[Sample]]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the base model; a model with new weights has one of the words in its data."""
    from nvila.base_models import base_tokenizer, local_bases
    from nvila.data.tokenizers import build_word_tokenizer
    from nvila_pipelines.steps.curate import texts

    if config.model.base is not None:
        return base_tokenizer(local_bases(config.model.base))
    # `text` holds all words of a built-in data set's images already.
    names = ("text", "clips") if "text" in datasets else tuple(datasets)
    words = [text for name in names for text in texts(datasets.get(name, []))]
    return build_word_tokenizer(words, model_max_length=config.model.max_length)


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
