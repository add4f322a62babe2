"""What a training loop takes its data from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

from nvila.data.conversation import Encoded
from nvila.data.sampling import GroupSampler

MicroBatch: TypeAlias = list[list[Encoded]]
"""Rows of one forward pass of one process; the samples of a row are laid out one behind the other."""


class BatchSource(Protocol):
    """Gives this process's share of every optimizer step, for ever.

    A step is one micro-batch or several, whose gradients are accumulated; the number may change from step to step, but
    all processes have the same. No micro-batch is empty.
    """

    def __next__(self) -> list[MicroBatch]:
        """Return the micro-batches of the next step."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data in JSON form, equal on every process and for any number of them."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position that `state_dict` returned, maybe among another number of processes."""


class GroupBatches:
    """One micro-batch a step, made of image groups."""

    def __init__(self, sampler: GroupSampler) -> None:
        self._sampler = sampler

    def __next__(self) -> list[MicroBatch]:
        """Return the groups of the next step as its only micro-batch."""
        return [next(self._sampler)]

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the sampler."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the position of the sampler."""
        self._sampler.load_state_dict(state)
