"""Which samples go into which step: shuffled image groups, dealt to processes without overlap."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Self

from nvila.data.conversation import Encoded
from nvila.errors import ConfigError


class GroupSampler:
    """Yields, for every step, this process's share of a global batch of image groups.

    Every pass over the data visits each image once in a new order. The sequence depends on the seed only, not on the
    number of processes: process `rank` of `world` takes every `world`-th group of the step.

    Args:
        groups: Samples that share images, one list for every set of images.
        images_per_step: Groups of a global batch.
        samples_per_image: At most this many samples of a group, chosen anew on every visit.
        seed: Fixes the sequence.
        rank: This process.
        world: Number of processes.

    Raises:
        ConfigError: There is no data, or the processes do not divide the batch.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Encoded]],
        *,
        images_per_step: int,
        samples_per_image: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not groups:
            raise ConfigError("the data set of a training stage is empty", "check curation.keep_rate and the data step")
        if images_per_step % world:
            lower = max(world, images_per_step - images_per_step % world)
            raise ConfigError(
                f"images_per_step={images_per_step} cannot be dealt to {world} processes",
                f"use a multiple of {world}, such as {lower}",
            )
        self._groups = groups
        self._images_per_step = images_per_step
        self._samples_per_image = samples_per_image
        self._random = random.Random(seed)
        self._rank, self._world = rank, world
        self._queue: list[int] = []
        self._shuffled_with = self._random.getstate()

    def __iter__(self) -> Self:
        """Iterate for ever over this process's groups of each step."""
        return self

    def __next__(self) -> list[list[Encoded]]:
        """Return this process's groups of the next step."""
        batch: list[list[Encoded]] = []
        while len(batch) < self._images_per_step:
            if not self._queue:
                self._shuffled_with = self._random.getstate()
                self._queue = self._shuffled()
            group = self._groups[self._queue.pop()]
            batch.append(self._random.sample(list(group), min(self._samples_per_image, len(group))))
        return batch[self._rank :: self._world]

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the sequence in JSON form; it is the same for every process and number of them."""
        return {
            "groups": len(self._groups),
            "left": len(self._queue),
            "shuffled_with": self._shuffled_with,
            "random": self._random.getstate(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position that `state_dict` returned.

        Raises:
            ConfigError: It belongs to other data.
        """
        if state["groups"] != len(self._groups):
            raise ConfigError(
                f"the position to go on from is in data of {state['groups']} image groups, this data has "
                f"{len(self._groups)}",
                "use the data that the run began with, or another output folder",
            )
        self._shuffled_with = _random_state(state["shuffled_with"])
        self._random.setstate(self._shuffled_with)
        self._queue = self._shuffled()[: state["left"]]
        self._random.setstate(_random_state(state["random"]))

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._groups)))
        self._random.shuffle(order)
        return order


def _random_state(raw: Sequence[Any]) -> tuple[Any, ...]:
    """Rebuild from JSON what `random.Random.getstate` returned."""
    version, numbers, gauss = raw
    return version, tuple(numbers), gauss
