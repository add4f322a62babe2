"""The data of a tuning run: split, indexed, and opened as batches. No weights are needed for any of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nvila.data.feeding import BatchFeed
from nvila.data.media_tiles import MediaReader
from nvila.data.readers.locations import FileSystems
from nvila.data.readers.record import CountedStream
from nvila.data.sample_encoding import SampleEncoder
from nvila.data.sample_store import SampleStore, build_store
from nvila.data.stage_data import StageData, index_folder, open_stage_data, quarantine_of, tile_positions
from nvila.data.token_budget import SampleSizes, TokenBudget
from nvila.errors import ConfigError
from nvila.processing import NVILAProcessor
from nvila.progress import SILENT, Reporter
from nvila.training.planning.sizes import meta_model
from nvila.tuning.config import TuneConfig
from nvila.tuning.splitting import Chosen, split
from nvila.tuning.timing import TimedStream

# A held-out set of this size tells losses apart well enough, and is passed by in seconds.
MOST_HELD_OUT = 512
_SAMPLES_PER_STEP = 16


@dataclass(slots=True, kw_only=True)
class TuneData:
    """The two sides of a data set, indexed.

    Args:
        train: Samples to learn from.
        held_out: Samples to measure by; None without a split.
        processor: The model's processor.
        directory: Folder of the indices.
        max_length: Longest sample in positions.
        max_bad: Largest share of samples that may be unusable.
        tile_positions: Positions that the tower's work on a tile is worth.
        store: The training samples on disk.
        filesystems: File systems besides local files.
    """

    train: CountedStream
    held_out: CountedStream | None
    processor: NVILAProcessor
    directory: Path
    max_length: int
    max_bad: float
    tile_positions: int
    store: SampleStore
    filesystems: FileSystems | None = None

    @property
    def sizes(self) -> SampleSizes:
        """What each training sample costs."""
        return self.store.sizes

    @property
    def costs(self) -> Any:
        """Positions that each training sample counts for in a budget."""
        return self.sizes.lengths + self.tile_positions * self.sizes.tiles

    def batch_tokens(self, samples: int = _SAMPLES_PER_STEP) -> int:
        """Return a budget for about so many samples a step, and for any single one."""
        return max(int(np.ceil(self.costs.mean() * samples)), int(self.costs.max()))

    def quarantine(self) -> list[dict[str, object]]:
        """Return the training samples that were set aside, with the reasons."""
        return quarantine_of(self.store.directory)

    def feed(self, config: TuneConfig, reporter: Reporter = SILENT) -> BatchFeed:
        """Open the training side as batches."""
        budget = TokenBudget(
            batch_tokens=config.batch_tokens,
            micro_batch_tokens=config.micro_batch_tokens,
            max_length=self.max_length,
            samples_per_image=config.samples_per_image,
            tile_positions=self.tile_positions,
        )
        return self._open(self.train, budget, config.seed, reporter)

    def held_out_feed(self, config: TuneConfig, reporter: Reporter = SILENT) -> BatchFeed | None:
        """Open the held-out side in batches of one forward pass."""
        if self.held_out is None:
            return None
        micro = max(config.micro_batch_tokens, self.max_length)
        budget = TokenBudget(
            batch_tokens=micro, micro_batch_tokens=micro, max_length=self.max_length, tile_positions=self.tile_positions
        )
        return self._open(self.held_out, budget, 0, reporter)

    def _open(self, stream: CountedStream, budget: TokenBudget, seed: int, reporter: Reporter) -> BatchFeed:
        return open_stage_data(
            StageData(expression=stream.name, budget=budget, max_bad=self.max_bad, seed=seed),
            stream,
            self.processor,
            self.directory,
            filesystems=self.filesystems,
            reporter=reporter,
        )


def open_tune_data(
    stream: CountedStream,
    processor: NVILAProcessor,
    config: Any,
    directory: Path,
    *,
    held_out: float | CountedStream = 0.1,
    max_length: int | None = None,
    max_bad: float = 0.01,
    seed: int = 0,
    filesystems: FileSystems | None = None,
    reporter: Reporter = SILENT,
) -> TuneData:
    """Split and index data.

    Args:
        stream: The data.
        processor: The model's processor.
        config: The model's configuration.
        directory: Where indices go; an index that is there is used again.
        held_out: Share of samples to measure by, or data of their own.
        max_length: Longest sample in positions; None takes that of the tokenizer.
        max_bad: Largest share of samples that may be unusable.
        seed: Deals the split.
        filesystems: File systems besides local files.
        reporter: Receives progress.

    Raises:
        ConfigError: There is no room for an image.
        DataError: The data cannot be read, or too much of it cannot be used.
    """
    length = max_length or int(processor.tokenizer.model_max_length)
    reporter.progress(f"read {stream.name}", 0, 0)
    train, measured = _sides(stream, held_out, seed)
    if config.num_time_tokens:
        train = TimedStream(train, config.num_time_tokens, config.time_token_format)
        if measured is not None:
            measured = TimedStream(measured, config.num_time_tokens, config.time_token_format)
    reader = MediaReader(processor)
    reader.check_room(length)
    stage = StageData(
        expression=train.name,
        budget=TokenBudget(batch_tokens=1, micro_batch_tokens=1, max_length=length),
        max_bad=max_bad,
    )
    store = build_store(
        train,
        reader,
        SampleEncoder(processor.tokenizer, reader, length),
        index_folder(stage, processor, directory),
        max_bad=max_bad,
        filesystems=filesystems,
        reporter=reporter,
    )
    return TuneData(
        train=train,
        held_out=measured,
        processor=processor,
        directory=directory,
        max_length=length,
        max_bad=max_bad,
        tile_positions=tile_positions(meta_model(config)),
        store=store,
        filesystems=filesystems,
    )


def batch_shapes(data: TuneData, config: TuneConfig) -> Mapping[str, int]:
    """Return the largest forward pass of the first epoch: rows, positions of a row, tiles, learned positions.

    Raises:
        ConfigError: The budget cannot be used.
    """
    from nvila.data.token_budget import TokenBudgetSampler, row_length, row_tiles

    budget = TokenBudget(
        batch_tokens=config.batch_tokens,
        micro_batch_tokens=config.micro_batch_tokens,
        max_length=data.max_length,
        samples_per_image=config.samples_per_image,
        tile_positions=data.tile_positions,
    )
    sampler = TokenBudgetSampler(data.sizes, budget, seed=config.seed)
    best: dict[str, int] = {}
    most = -1
    for _ in range(sampler.num_steps(1)):
        for rows in next(sampler):
            longest = max((row_length(data.sizes, row) for row in rows), default=0)
            tiles = sum(row_tiles(data.sizes, row) for row in rows)
            work = longest * len(rows) + data.tile_positions * tiles
            if work > most:
                most, best = work, {"rows": len(rows), "row": longest, "tiles": tiles, "samples": sum(map(len, rows))}
    if not best:
        raise ConfigError("there is nothing to train on", "name data with samples")
    return best


def _sides(
    stream: CountedStream, held_out: float | CountedStream, seed: int
) -> tuple[CountedStream, CountedStream | None]:
    if not isinstance(held_out, float | int):
        return stream, held_out
    if held_out == 0:
        return stream, None
    sides = split(stream, float(held_out), most=MOST_HELD_OUT, seed=seed)
    # The index of a side must not be taken for that of another split.
    mark = hashlib.blake2b(repr(sides).encode(), digest_size=6).hexdigest()
    return (
        Chosen(stream, f"{stream.name}#train-{mark}", sides.train),
        Chosen(stream, f"{stream.name}#held-out-{mark}", sides.held_out),
    )
