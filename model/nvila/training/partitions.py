"""Weights and optimizer state by parameter name, whatever part of them each process holds.

A backend tells which stretch of which flat tensor of the optimizer belongs to a parameter (a `Piece`). From that, whole
tensors are put together for a checkpoint and taken apart again when it is read, so that a checkpoint knows neither the
number of processes nor the ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from nvila.errors import CheckpointError
from nvila.training.optimizers.states import MOMENTS, exact_state, set_exact_state, set_moments, step_count, wide_moment

WEIGHT = "weight"


class TensorSource(Protocol):
    """Gives stretches of the flat tensors of a checkpoint."""

    def __contains__(self, name: str) -> bool:
        """Tell whether there is such a tensor."""

    def stretch(self, name: str, start: int, length: int) -> Tensor:
        """Return `length` elements of a tensor from `start` on, on the CPU."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """The part of a trained parameter whose optimizer state this process holds.

    Args:
        name: Name of the parameter in the module.
        numel: Elements of the whole parameter.
        master: Tensor that the optimizer knows, fp32; None when this process holds nothing of the parameter.
        offset: Where the stretch begins in the flat master.
        start: Where it begins in the flat parameter.
        length: Its elements.
    """

    name: str
    numel: int
    master: Tensor | None
    offset: int
    start: int
    length: int


class Partitions:
    """Access to the trained weights and the optimizer state of one process.

    Args:
        pieces: One for every trained parameter, in the same order on every process.
        masters: All tensors that the optimizer knows on this process.
        optimizer: The optimizer.
        shared: Whether processes hold different parts; then every process must call `tensors`.
        device: Where whole tensors are put together.
        sync: Called after weights were set, to bring them from the masters to the module.
    """

    def __init__(
        self,
        pieces: list[Piece],
        masters: list[Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        shared: bool,
        device: torch.device,
        sync: Callable[[], None],
    ) -> None:
        self._pieces = pieces
        self._masters = masters
        self._optimizer = optimizer
        self._shared = shared
        self._device = device
        self._sync = sync

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield `<weight or moment>/<parameter>` and the whole flat fp32 tensor, in one order on every process."""
        for piece in self._pieces:
            yield f"{WEIGHT}/{piece.name}", self._whole(piece, piece.master)
        for moment in MOMENTS:
            last, wide = None, None
            for piece in self._pieces:
                if self._started(piece):
                    # Neighbours share a master, and FP8 moments are costly to widen.
                    if piece.master is not None and piece.master is not last:
                        last, wide = piece.master, wide_moment(self._optimizer, piece.master, moment)
                    yield f"{moment}/{piece.name}", self._whole(piece, wide)

    def step_counts(self) -> dict[str, int]:
        """Return how often the optimizer has updated each parameter that has a state."""
        shared = max((step_count(self._optimizer, master) for master in self._masters), default=0)
        counts = {
            piece.name: shared if self._shared or piece.master is None else step_count(self._optimizer, piece.master)
            for piece in self._pieces
        }
        return {name: count for name, count in counts.items() if count}

    def exact(self) -> dict[str, Tensor]:
        """Return this process's state in the optimizer's own form where `tensors` would round it, else nothing."""
        return {
            f"{number}/{name}": value
            for number, master in enumerate(self._masters)
            for name, value in exact_state(self._optimizer, master).items()
        }

    @torch.no_grad()
    def restore(self, source: TensorSource, step_counts: Mapping[str, int], exact: Mapping[str, Tensor]) -> None:
        """Take over weights and optimizer state.

        Args:
            source: What `tensors` yielded, on whatever processes.
            step_counts: What `step_counts` returned.
            exact: What `exact` returned on this process when the processes were the same; empty otherwise.

        Raises:
            CheckpointError: The source lacks a parameter.
        """
        by_master: dict[int, list[Piece]] = {id(master): [] for master in self._masters}
        for piece in self._pieces:
            if f"{WEIGHT}/{piece.name}" not in source:
                raise CheckpointError(
                    f"the checkpoint has no weights of {piece.name}", "go on with the model that it was made of"
                )
            if piece.master is not None:
                by_master[id(piece.master)].append(piece)
        for number, master in enumerate(self._masters):
            pieces = by_master[id(master)]
            _fill(master.detach().view(-1), WEIGHT, pieces, source)
            count = max((step_counts.get(piece.name, 0) for piece in pieces), default=0)
            if not count:
                continue
            if own := {name.partition("/")[2]: v for name, v in exact.items() if name.startswith(f"{number}/")}:
                set_exact_state(self._optimizer, master, own, count)
                continue
            moments = {moment: torch.zeros_like(master, dtype=torch.float32) for moment in MOMENTS}
            for moment, values in moments.items():
                _fill(values.view(-1), moment, pieces, source)
            set_moments(self._optimizer, master, moments, count)
        self._sync()

    def _started(self, piece: Piece) -> bool:
        if self._shared:
            return any(step_count(self._optimizer, master) for master in self._masters)
        return piece.master is not None and step_count(self._optimizer, piece.master) > 0

    def _whole(self, piece: Piece, flat: Tensor | None) -> Tensor:
        whole = torch.zeros(piece.numel, dtype=torch.float32, device=self._device)
        if piece.master is not None and flat is not None:
            whole[piece.start : piece.start + piece.length] = flat.detach().view(-1)[
                piece.offset : piece.offset + piece.length
            ]
        if self._shared:
            # As integers: adding 0.0 would turn -0.0 into 0.0, and a resumed run shall not differ in one bit.
            torch.distributed.all_reduce(whole.view(torch.int32))
        return whole


def whole_parameters(module: nn.Module, optimizer: torch.optim.Optimizer) -> Partitions:
    """Return the partitions of a process that holds everything itself."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    pieces = [Piece(name=name, numel=p.numel(), master=p, offset=0, start=0, length=p.numel()) for name, p in trained]
    masters: list[Tensor] = [p for _, p in trained]
    device = masters[0].device
    return Partitions(pieces, masters, optimizer, shared=False, device=device, sync=lambda: None)


def _fill(flat: Tensor, kind: str, pieces: list[Piece], source: TensorSource) -> None:
    for piece in pieces:
        # A parameter that never had a gradient has no moments where parameters are not flattened together.
        if f"{kind}/{piece.name}" in source:
            values = source.stretch(f"{kind}/{piece.name}", piece.start, piece.length)
            flat[piece.offset : piece.offset + piece.length].copy_(values)
