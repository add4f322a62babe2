"""Which samples go into which step: shuffled image groups, dealt to processes without overlap."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

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

    def __iter__(self) -> Iterator[list[list[Encoded]]]:
        """Iterate for ever over this process's groups of each step."""
        queue: list[int] = []
        while True:
            batch: list[list[Encoded]] = []
            while len(batch) < self._images_per_step:
                if not queue:
                    queue = list(range(len(self._groups)))
                    self._random.shuffle(queue)
                group = self._groups[queue.pop()]
                batch.append(self._random.sample(list(group), min(self._samples_per_image, len(group))))
            yield batch[self._rank :: self._world]
