"""Batches by a budget of tokens instead of a number of samples.

A global batch holds the samples whose positions fill the budget of a step. Its rows are dealt to the processes, longest
first to the one with the least work, and cut into micro-batches that fit into a forward pass. Only lengths are looked
at, so an epoch is planned before anything is read. The global batches follow from the seed and the data alone: any
number of processes sees the same ones, and a run that stopped goes on with the next one in any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvila.data.packing import pack_lengths
from nvila.errors import CheckpointError, ConfigError

Row = tuple[int, ...]
"""Numbers of the samples of a row."""
Rows = list[Row]
Ints = NDArray[np.int64]

# Without packing, samples of so many global batches are sorted by length together; more would save little padding and
# make the batches less random.
_WINDOW_BATCHES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSizes:
    """What each sample of a data set costs.

    Args:
        lengths: Positions of every sample.
        tiles: Tiles and frames that it sends through the vision tower.
        prefixes: Positions at its beginning that it shares with the other samples of its group.
        groups: Number of its group; samples of a group show the same media behind the same words.
    """

    lengths: Ints
    tiles: Ints
    prefixes: Ints
    groups: Ints

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBudget:
    """How much goes into a step.

    Args:
        batch_tokens: Positions of a global batch.
        micro_batch_tokens: Positions of one forward pass of one process, padding included. May change on a resume.
        max_length: Longest row; for rows of several samples the work on their tiles is included.
        pack: Fill rows with whole samples; otherwise a row is one sample, or the samples of an image that share it,
            and rows of similar length stand together.
        samples_per_image: At most this many samples of an image share a row and one encoding of the image.
        tile_positions: Positions that the work on a tile is worth, besides those that its visual tokens fill.
        flat: Rows of a forward pass are joined without padding, which leaves room for more of them.
    """

    batch_tokens: int
    micro_batch_tokens: int
    max_length: int
    pack: bool = False
    samples_per_image: int = 1
    tile_positions: int = 0
    flat: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "micro_batch_tokens", "max_length", "samples_per_image"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", "use 1 or more")
        if self.micro_batch_tokens > self.batch_tokens:
            raise ConfigError(
                f"micro_batch_tokens {self.micro_batch_tokens} is more than batch_tokens {self.batch_tokens}",
                f"use micro_batch_tokens of at most {self.batch_tokens}",
            )


class TokenBudgetSampler:
    """Yields, for every step, the micro-batches of this process as rows of sample numbers.

    Every sample comes exactly once an epoch, in a new order; the last batch of an epoch may be smaller. All processes
    get the same number of micro-batches. One that has fewer rows than that gets empty ones.

    Args:
        sizes: The samples.
        budget: How much goes into a step.
        seed: Fixes the sequence.
        rank: This process.
        world: Number of processes.

    Raises:
        ConfigError: There are no samples, one of them is over the budget, or the budget leaves processes without work.
    """

    def __init__(self, sizes: SampleSizes, budget: TokenBudget, *, seed: int, rank: int = 0, world: int = 1) -> None:
        _check(sizes, budget, world)
        self._sizes, self._budget, self._seed = sizes, budget, seed
        self._rank, self._world = rank, world
        self._epoch, self._step = 0, 0
        self._plan = _EpochPlan.make(sizes, budget, seed, 0)

    def __iter__(self) -> TokenBudgetSampler:
        return self

    def __next__(self) -> list[Rows]:
        """Return the micro-batches of the next step; there is always one."""
        if self._step == self._plan.num_batches:
            self._move(self._epoch + 1, 0)
        rows = self._plan.rows(self._step)
        self._step += 1
        return self._micro_batches(rows)

    def num_steps(self, epochs: float) -> int:
        """Count the steps of so many epochs from the start; a part of an epoch is rounded up to whole steps."""
        whole = math.floor(epochs)
        steps = [_EpochPlan.make(self._sizes, self._budget, self._seed, number).num_batches for number in range(whole)]
        rest = epochs - whole
        if rest:
            last = _EpochPlan.make(self._sizes, self._budget, self._seed, whole).num_batches
            steps.append(math.ceil(rest * last))
        return sum(steps)

    def global_batch(self, epoch: int, number: int) -> Rows:
        """Return the rows of a global batch, whoever gets them."""
        plan = self._plan if epoch == self._epoch else _EpochPlan.make(self._sizes, self._budget, self._seed, epoch)
        return plan.rows(number)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, which is the same in all processes, as JSON."""
        return {"epoch": self._epoch, "step": self._step, "data": self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called, also in another number of processes.

        Raises:
            CheckpointError: The state belongs to other data or to another budget.
        """
        if state["data"] != self._fingerprint():
            raise CheckpointError(
                "the data of the stage, its token budget or the seed changed since the checkpoint was written",
                "restore them, or start the stage again in a new folder",
            )
        self._move(state["epoch"], state["step"])

    def _move(self, epoch: int, step: int) -> None:
        if epoch != self._epoch:
            self._plan = _EpochPlan.make(self._sizes, self._budget, self._seed, epoch)
        self._epoch, self._step = epoch, step

    def _fingerprint(self) -> str:
        budget = asdict(self._budget)
        for name in ("micro_batch_tokens", "flat"):
            del budget[name]  # which follows the machine and moves no sample to another batch
        digest = hashlib.blake2b(json.dumps([self._seed, budget], sort_keys=True).encode())
        for column in (self._sizes.lengths, self._sizes.tiles, self._sizes.prefixes, self._sizes.groups):
            digest.update(np.ascontiguousarray(column, np.int64).tobytes())
        return digest.hexdigest()[:32]

    def _micro_batches(self, rows: Rows) -> list[Rows]:
        """Deal the rows of a step to all processes and return this one's share, as many as the others have."""
        shares: list[Rows] = [[] for _ in range(self._world)]
        work = [0] * self._world
        weights = {row: self._weight(row) for row in rows}
        for row in sorted(rows, key=lambda row: (-weights[row], row)):
            least = work.index(min(work))
            shares[least].append(row)
            work[least] += weights[row]
        cut = [self._cut(share) for share in shares]
        return _split_to(cut[self._rank], max(map(len, cut)))

    def _cut(self, rows: Rows) -> list[Rows]:
        """Put rows of similar length into micro-batches within the budget of a forward pass."""
        micro: list[Rows] = []
        positions = width = tiles = 0
        for row in sorted(rows, key=lambda row: (-row_length(self._sizes, row), row)):
            length, own = row_length(self._sizes, row), self._tiles(row)
            wide = positions + (length if self._budget.flat else width)
            if micro and wide + (tiles + own) * self._budget.tile_positions <= self._budget.micro_batch_tokens:
                micro[-1].append(row)
                positions, tiles = wide, tiles + own
            else:
                micro.append([row])
                positions, width, tiles = length, length, own
        return micro

    def _tiles(self, row: Row) -> int:
        return row_tiles(self._sizes, row)

    def _weight(self, row: Row) -> int:
        return row_length(self._sizes, row) + self._budget.tile_positions * self._tiles(row)


def row_length(sizes: SampleSizes, row: Row) -> int:
    """Positions of a row; samples of one group share their beginning."""
    lengths = sizes.lengths[list(row)]
    shared = _shared(sizes, row)
    return int(lengths.sum()) - shared * (len(row) - 1)


def row_tiles(sizes: SampleSizes, row: Row) -> int:
    """Tiles of a row; samples of one group show theirs once."""
    return int(sizes.tiles[row[0]] if _shared(sizes, row) else sizes.tiles[list(row)].sum())


def _shared(sizes: SampleSizes, row: Row) -> int:
    one_group = len(row) > 1 and len(set(sizes.groups[list(row)].tolist())) == 1
    return int(sizes.prefixes[row[0]]) if one_group else 0


@dataclass(frozen=True, slots=True)
class _EpochPlan:
    """The units of an epoch, in the order in which they come: what shares a row in any case."""

    sizes: SampleSizes
    budget: TokenBudget
    units: list[Row] | Ints
    bounds: Ints

    @classmethod
    def make(cls, sizes: SampleSizes, budget: TokenBudget, seed: int, epoch: int) -> _EpochPlan:
        noise = np.random.default_rng([seed, epoch])
        order: Ints = noise.permutation(len(sizes))
        if budget.samples_per_image == 1:
            lengths = sizes.lengths[order]
            costs = lengths + budget.tile_positions * sizes.tiles[order]
            units: list[Row] | Ints = order
        else:
            rows = _grouped(sizes, budget, order)
            units = [rows[index] for index in noise.permutation(len(rows)).tolist()]
            lengths = np.array([row_length(sizes, row) for row in units])
            costs = lengths + budget.tile_positions * np.array([row_tiles(sizes, row) for row in units])
        if budget.pack:
            return cls(sizes, budget, units, _bounds(costs, budget.batch_tokens))
        by_length = _sorted_in_windows(lengths, costs, _WINDOW_BATCHES * budget.batch_tokens)
        bounds = _bounds(costs[by_length], budget.batch_tokens)
        shuffled = noise.permutation(len(bounds))
        starts = np.concatenate([[0], bounds[:-1]])
        order = np.concatenate([by_length[starts[number] : bounds[number]] for number in shuffled])
        counts = (bounds - starts)[shuffled]
        units = units[order] if isinstance(units, np.ndarray) else [units[index] for index in order.tolist()]
        return cls(sizes, budget, units, np.cumsum(counts))

    @property
    def num_batches(self) -> int:
        return len(self.bounds)

    def rows(self, number: int) -> Rows:
        start, end = int(self.bounds[number - 1]) if number else 0, int(self.bounds[number])
        chosen = self.units[start:end]
        units: Rows = [(index,) for index in chosen.tolist()] if isinstance(chosen, np.ndarray) else chosen
        if not self.budget.pack:
            return units
        # The samples of an image share its encoding, and a row has room for one prefix only.
        full = [unit for unit in units if len(unit) > 1 or self._work(unit[0]) > self.budget.max_length]
        single = [unit[0] for unit in units if len(unit) == 1 and self._work(unit[0]) <= self.budget.max_length]
        rows = pack_lengths([self._work(index) for index in single], self.budget.max_length)
        return full + [tuple(single[index] for index in row) for row in rows]

    def _work(self, index: int) -> int:
        return int(self.sizes.lengths[index] + self.budget.tile_positions * self.sizes.tiles[index])


def _check(sizes: SampleSizes, budget: TokenBudget, world: int) -> None:
    if not len(sizes):
        raise ConfigError(
            "the data set of a training stage is empty", "check what its data names, and quarantine.jsonl"
        )
    longest = int(sizes.lengths.max())
    if longest > budget.max_length:
        raise ConfigError(f"a sample has {longest} positions, max_length is {budget.max_length}", "raise max_length")
    costs = sizes.lengths + budget.tile_positions * sizes.tiles
    largest = int(costs.max())
    if largest > budget.micro_batch_tokens:
        where = int(costs.argmax())
        raise ConfigError(
            f"micro_batch_tokens is {budget.micro_batch_tokens}, but a sample of {int(sizes.lengths[where])} positions "
            f"and {int(sizes.tiles[where])} tiles counts for {largest}",
            f"use micro_batch_tokens={largest} or more, or a smaller max_length or fewer tiles",
        )
    if (budget.pack or budget.samples_per_image > 1) and budget.micro_batch_tokens < budget.max_length:
        raise ConfigError(
            f"micro_batch_tokens is {budget.micro_batch_tokens}, but rows take up to {budget.max_length} positions",
            f"use micro_batch_tokens={budget.max_length} or more, or a shorter max_length",
        )
    if budget.pack and budget.batch_tokens < world * budget.max_length and world > 1:
        raise ConfigError(
            f"batch_tokens={budget.batch_tokens} cannot be dealt to {world} processes in rows of {budget.max_length}",
            f"use batch_tokens={world * budget.max_length} or more, a shorter max_length, or fewer processes",
        )
    mean = float(costs.mean())
    if budget.batch_tokens < world * mean and len(sizes) > 1:
        raise ConfigError(
            f"batch_tokens={budget.batch_tokens} cannot be dealt to {world} processes: a sample counts for {mean:.0f} "
            "positions on average",
            f"use batch_tokens={world * largest} or more, "
            f"or at most {max(1, int(budget.batch_tokens // mean))} processes",
        )


def _grouped(sizes: SampleSizes, budget: TokenBudget, order: Ints) -> list[Row]:
    """Put samples of one group into rows, in the order given, as long as they fit."""
    order = order[np.argsort(sizes.groups[order], kind="stable")]
    rows: list[Row] = []
    row: list[int] = []
    for index in order.tolist():
        if row and _joins(sizes, budget, row, index):
            row.append(index)
        else:
            if row:
                rows.append(tuple(row))
            row = [index]
    return [*rows, tuple(row)]


def _joins(sizes: SampleSizes, budget: TokenBudget, row: list[int], index: int) -> bool:
    """Whether a sample may share the row of others."""
    first, prefix = row[0], int(sizes.prefixes[index])
    if not prefix or sizes.groups[first] != sizes.groups[index] or len(row) == budget.samples_per_image:
        return False
    return row_length(sizes, (*row, index)) + budget.tile_positions * int(sizes.tiles[index]) <= budget.max_length


def _sorted_in_windows(lengths: Ints, costs: Ints, window: int) -> Ints:
    """Return the order in which neighbours within a window have similar length."""
    windows = (np.cumsum(costs) - 1) // window
    order: Ints = np.lexsort((np.arange(len(lengths)), lengths, windows))
    return order


def _bounds(costs: Ints, budget: int) -> Ints:
    """Return where batches end that are filled one after the other."""
    total = np.cumsum(costs)
    ends: list[int] = []
    done = 0
    while done < len(costs):
        used = int(total[done - 1]) if done else 0
        done = max(done + 1, int(np.searchsorted(total, used + budget, "right")))
        ends.append(done)
    return np.array(ends)


def _split_to(micro: Sequence[Rows], count: int) -> list[Rows]:
    """Cut micro-batches further until there are `count`; what cannot be cut is joined by empty ones."""
    result = list(micro)
    while len(result) < count:
        most = max(range(len(result)), key=lambda index: len(result[index]), default=0)
        if not result or len(result[most]) < 2:
            result.append([])
            continue
        rows = result[most]
        result[most : most + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return result
