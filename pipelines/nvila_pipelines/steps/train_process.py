"""The training process that the launcher starts, once for every rank."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nvila.data.mixtures import Registry
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
    from nvila_pipelines.training.curated import curation_counts
    from nvila_pipelines.training.mixtures import open_registry
    from nvila_platform.s3_filesystem import data_filesystems
    from nvila_platform.settings import Settings
    from nvila_platform.telemetry import EventLog
    from nvila_platform.training import observe_training
    from nvila_platform.training.backup import backed_up

    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    config, settings = TrainConfig.from_dict(spec["config"]), Settings.load()
    data, selection, out = Path(spec["data"]), Path(spec["selection"]), Path(spec["out"])
    # One rank reports; the others would say the same.
    first = os.environ.get("RANK", "0") == "0"
    events = EventLog(Path(spec["events"]), step="train") if first else None
    datasets, images, videos = _data(config, data, selection, events or SILENT)
    filesystems = data_filesystems(settings)
    registry = open_registry(data, filesystems)
    run = partial(
        train, config, datasets, images, _tokenizer(config, datasets, registry), out,
        videos=videos, registry=registry, filesystems=filesystems,
    )  # fmt: skip
    if events is None:
        with watched_signals() as stop:
            run(SILENT, stop=stop)
        return
    curation = partial(curation_counts, config, data, selection, registry, filesystems)
    with (
        backed_up(settings, out, events.notice),
        observe_training(config, settings, out_dir=out, reporter=events, curation=curation) as observer,
        watched_signals() as stop,
    ):
        run(_Notices(events), observers=(observer,), stop=stop)


def _data(
    config: TrainConfig, data: Path, selection: Path, reporter: Reporter
) -> tuple[Mapping[str, Sequence[Sample]], MediaTable, MediaTable | None]:
    """Read the samples that stages name, and open their images and videos."""
    from nvila.data.dataset import IMAGES_FILE, VIDEOS_FILE, load_samples
    from nvila.data.media import ImageTable
    from nvila.data.records import read_jsonl
    from nvila_pipelines.training.mixtures import REGISTRY_FILE, read_mixtures

    if (data / REGISTRY_FILE).is_file():
        # Stages with a token budget read theirs from where they lie.
        named = [stage.data for stage in config.stages if stage.batch_tokens is None]
        mixtures, media = read_mixtures(named, data, reporter)
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


def _tokenizer(
    config: TrainConfig, datasets: Mapping[str, Sequence[Sample]], registry: Registry
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the base model; a model with new weights has one of the words in its data."""
    from nvila.base_models import base_tokenizer, local_bases
    from nvila.data.tokenizers import build_word_tokenizer
    from nvila_pipelines.steps.curate import texts

    if config.model.base is not None:
        return base_tokenizer(local_bases(config.model.base))
    # `text` holds all words of a built-in data set's images already.
    names = ("text", "clips") if "text" in datasets else tuple(datasets)
    words = [text for name in names for text in texts(datasets.get(name, []))]
    for expression in dict.fromkeys(stage.data for stage in config.stages if stage.data not in datasets):
        samples = (record.sample for record in registry.open(expression).records())
        words += [text for sample in samples if sample is not None for text in texts([sample])]
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
