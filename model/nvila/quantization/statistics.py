"""What calibration remembers of a linear layer's inputs: two numbers a channel, some rows, and a product a group.

Shape suffixes: N rows, I inputs, O outputs, G groups, g inputs of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

KEPT_ROWS = 512


@dataclass(slots=True)
class InputStatistics:
    """Statistics of the rows that a linear layer has read.

    Args:
        group_size: Inputs of a group, for `gram`; None leaves it out.
        wanted_rows: Rows that come altogether, to keep a sample that is spread evenly.
    """

    group_size: int | None
    wanted_rows: int
    count: int = 0
    sum_abs: Tensor | None = None
    max_abs: Tensor | None = None
    gram: Tensor | None = None
    _kept: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Add inputs (..., I)."""
        x_NI = x.detach().reshape(-1, x.shape[-1]).float()
        if self.sum_abs is None or self.max_abs is None:
            self.sum_abs, self.max_abs = x_NI.new_zeros(x_NI.shape[1]), x_NI.new_zeros(x_NI.shape[1])
        magnitude = x_NI.abs()
        self.sum_abs += magnitude.sum(0)
        self.max_abs = torch.maximum(self.max_abs, magnitude.amax(0))
        if self.group_size is not None:
            grouped_GNg = x_NI.unflatten(1, (-1, self.group_size)).transpose(0, 1)
            product = grouped_GNg.transpose(1, 2) @ grouped_GNg
            self.gram = product if self.gram is None else self.gram + product
        stride = max(1, self.wanted_rows // KEPT_ROWS)
        # Rows at multiples of the stride of all rows, whatever batches they come in.
        self._kept.append(x.detach().reshape(-1, x.shape[-1])[-self.count % stride :: stride].clone())
        self.count += len(x_NI)

    @property
    def mean_abs(self) -> Tensor:
        """Mean magnitude of every input, (I)."""
        assert self.sum_abs is not None
        return self.sum_abs / max(1, self.count)

    @property
    def rows(self) -> Tensor:
        """Some rows (N, I), spread over all."""
        return torch.cat(self._kept)[:KEPT_ROWS]


@contextmanager
def watching_inputs(
    layers: Mapping[str, nn.Linear], make: Callable[[], InputStatistics]
) -> Iterator[dict[str, InputStatistics]]:
    """Collect statistics of what linear layers read while the context lasts.

    Layers that read the same tensor, as queries, keys and values do, share one entry.
    """
    found: dict[str, InputStatistics] = {}
    latest: dict[str, object] = {"input": None, "statistics": None}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def watch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            same = latest["input"] is x
            if name not in found:
                shared = latest["statistics"] if same else None
                found[name] = shared if isinstance(shared, InputStatistics) else make()
            if not (same and latest["statistics"] is found[name]):
                found[name].add(x)
            latest.update(input=x, statistics=found[name])

        return watch

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        latest.clear()
