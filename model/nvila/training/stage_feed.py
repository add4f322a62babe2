"""What feeds a stage that has a token budget: batches from data of any size, indexed once and read ahead."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvila.data.feeding import BatchFeed
from nvila.data.media_layout import MediaKind
from nvila.data.mixtures import Registry
from nvila.data.readers.locations import FileSystems
from nvila.data.readers.record import CountedStream, Record
from nvila.data.records import Sample
from nvila.data.sample_encoding import media_of
from nvila.data.stage_data import StageData, open_stage_data, quarantine_of, tile_positions
from nvila.data.token_budget import TokenBudget
from nvila.errors import ConfigError, DataError, nearest
from nvila.modeling import NVILAForConditionalGeneration
from nvila.packed_attention import joins_rows
from nvila.processing import NVILAProcessor
from nvila.progress import Reporter
from nvila.training.config import StageConfig, TrainConfig
from nvila.training.media import MediaTable
from nvila.training.processes import rank, world_size

INDEX_FOLDER = ".data"
QUARANTINE_FOLDER = "quarantine"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSources:
    """Where stages find what they name.

    Args:
        datasets: Samples in memory by name.
        images: Their images.
        videos: Their videos; None where no sample has one.
        registry: Names of other data sets; None knows the built-in ones and paths.
        filesystems: File systems besides local files.
    """

    datasets: Mapping[str, Sequence[Sample]]
    images: MediaTable
    videos: MediaTable | None = None
    registry: Registry | None = None
    filesystems: FileSystems | None = None

    def stream(self, expression: str) -> CountedStream:
        """Open the data of a stage.

        Raises:
            ConfigError: It is neither a name nor a path.
            DataError: It cannot be read.
        """
        if expression in self.datasets:
            return _InMemory(expression, self.datasets[expression], self.images, self.videos)
        return (self.registry or Registry(filesystems=self.filesystems)).open(expression)


def check_data(config: TrainConfig, sources: DataSources) -> None:
    """Refuse stages whose data are not there, before anything is trained.

    Raises:
        ConfigError: Such data are named.
        DataError: Such data cannot be read.
    """
    for stage in config.stages:
        if stage.data in sources.datasets:
            continue
        if stage.batch_tokens is None:
            raise ConfigError(
                f"stages.{stage.name}.data is '{stage.data}'",
                f"{nearest(stage.data, sources.datasets)}; with batch_tokens a stage reads any data set or path",
            )
        sources.stream(stage.data)


@contextmanager
def token_feed(
    stage: StageConfig,
    config: TrainConfig,
    number: int,
    model: NVILAForConditionalGeneration,
    processor: NVILAProcessor,
    sources: DataSources,
    out_dir: Path,
    reporter: Reporter,
) -> Iterator[BatchFeed]:
    """Open the feed of a stage with a token budget; what could not be used is written down when it closes.

    Args:
        stage: The stage; it has `batch_tokens`.
        config: The run.
        number: Place of the stage in the run, from 1.
        model: The model, its parameters not partitioned yet.
        processor: Its processor, which looks at videos as the stage says.
        sources: Where the data are.
        out_dir: Folder of the run.
        reporter: Receives progress and notices.

    Raises:
        ConfigError: The data or the budget cannot be used.
        DataError: Too much of the data cannot be used.
    """
    length, batch = stage.max_length or config.model.max_length, stage.batch_tokens or 0
    budget = TokenBudget(
        batch_tokens=batch,
        micro_batch_tokens=stage.micro_batch_tokens or max(batch // world_size(), length),
        max_length=length,
        pack=stage.pack,
        samples_per_image=stage.samples_per_image,
        tile_positions=tile_positions(model),
        flat=stage.samples_per_image == 1 and joins_rows(model.model.language_model),
    )
    feed = open_stage_data(
        StageData(
            expression=stage.data,
            budget=budget,
            tiling=stage.tiling,
            num_frames=stage.frames,
            max_bad=stage.max_bad,
            seed=config.seed * 1000 + number,
        ),
        sources.stream(stage.data),
        processor,
        out_dir / INDEX_FOLDER,
        rank=rank(),
        world=world_size(),
        filesystems=sources.filesystems,
        reporter=reporter,
    )
    try:
        yield feed
    finally:
        feed.close()
    if rank() == 0:
        _write_quarantine(out_dir / QUARANTINE_FOLDER / f"{stage.name}.jsonl", quarantine_of(feed.directory))


def _write_quarantine(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    if entries:
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")


class _InMemory:
    """Samples in memory as a stream."""

    def __init__(self, name: str, samples: Sequence[Sample], images: MediaTable, videos: MediaTable | None) -> None:
        self.name = name
        self._samples = samples
        self._tables: dict[MediaKind, MediaTable | None] = {"image": images, "video": videos}

    def count(self) -> int:
        return len(self._samples)

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        for index, sample in enumerate(self._samples[start:stop], start=start):
            media = {key: _TableMedium(self._tables[kind], key) for kind, key in media_of(sample)}
            yield Record(index=index, where=f"{self.name}:{index + 1}", sample=sample, media=media)


@dataclass(frozen=True, slots=True)
class _TableMedium:
    table: MediaTable | None
    key: str

    def read(self) -> bytes:
        if self.table is None:
            raise DataError(f"'{self.key}' is a video, but there are none", "give training its videos")
        return self.table.encoded(self.key)
