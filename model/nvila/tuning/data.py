"""The data of a tuning run: split, indexed, and opened as batches. No weights are needed for any of it."""

from __future__ import annotations

import hashlib
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
from nvila.packed_attention import can_join_rows
from nvila.processing import NVILAProcessor
from nvila.progress import SILENT, Reporter
from nvila.training.planning.sizes import meta_model
from nvila.training.processes import rank, world_size
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
        can_join: Whether the model's decoder takes rows that are joined without padding.
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
    can_join: bool = False
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
        return self._open(self.train, self.budget(config), config.seed, reporter)

    def budget(self, config: TuneConfig) -> TokenBudget:
        """Return what goes into a step and a forward pass."""
        return TokenBudget(
            batch_tokens=config.batch_tokens,
            micro_batch_tokens=config.micro_batch_tokens,
            max_length=self.max_length,
            samples_per_image=config.samples_per_image,
            tile_positions=self.tile_positions,
            flat=self.can_join and config.attention == "sdpa" and config.samples_per_image == 1,
        )

    def held_out_feed(self, config: TuneConfig, reporter: Reporter = SILENT) -> BatchFeed | None:
        """Open the held-out side in batches of one forward pass of each process."""
        if self.held_out is None:
            return None
        micro = max(config.micro_batch_tokens, self.max_length)
        budget = TokenBudget(
            batch_tokens=micro * world_size(),
            micro_batch_tokens=micro,
            max_length=self.max_length,
            tile_positions=self.tile_positions,
        )
        return self._open(self.held_out, budget, 0, reporter)

    def _open(self, stream: CountedStream, budget: TokenBudget, seed: int, reporter: Reporter) -> BatchFeed:
        return open_stage_data(
            StageData(expression=stream.name, budget=budget, max_bad=self.max_bad, seed=seed),
            stream,
            self.processor,
            self.directory,
            rank=rank(),
            world=world_size(),
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
        can_join=can_join_rows(config.text_config),
        filesystems=filesystems,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Largest:
    """The largest forward pass of an epoch.

    Args:
        rows: Rows; 1 where they are joined.
        row: Positions of a row.
        span: Positions that one position is compared with: those of its row, or of its own sample on average.
        tiles: Tiles and frames through the tower.
        samples: Samples of all rows.
    """

    rows: int
    row: int
    span: int
    tiles: int
    samples: int


def largest_pass(data: TuneData, config: TuneConfig, processes: int = 1) -> Largest:
    """Return the largest forward pass of the first process in the first epoch.

    Raises:
        ConfigError: The budget cannot be used.
    """
    from nvila.data.token_budget import TokenBudgetSampler, row_length, row_tiles

    budget = data.budget(config)
    sampler = TokenBudgetSampler(data.sizes, budget, seed=config.seed, world=processes)
    best: Largest | None = None
    most = -1
    for _ in range(sampler.num_steps(1)):
        for rows in next(sampler):
            lengths = [row_length(data.sizes, row) for row in rows]
            tiles = sum(row_tiles(data.sizes, row) for row in rows)
            longest, positions = max(lengths, default=0), sum(lengths)
            work = (positions if budget.flat else longest * len(rows)) + data.tile_positions * tiles
            if work > most:
                most = work
                span = round(sum(length * length for length in lengths) / max(1, positions))
                best = Largest(
                    rows=1 if budget.flat else len(rows),
                    row=positions if budget.flat else longest,
                    span=span if budget.flat else longest,
                    tiles=tiles,
                    samples=sum(map(len, rows)),
                )
    if best is None:
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
