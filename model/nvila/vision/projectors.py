"""Projectors: token compression by space-to-channel, then a small MLP into the language model's width.

A projector is a row of `PROJECTORS`; to add one, add a row. Released checkpoints name their parameters
`layers.<index>`, so the order of a plan, the parameter-free steps included, is part of the format.

Shape suffixes: B tiles, N tokens of a tile, C channels of the tower, H width of the language model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

from torch import Tensor, nn

from nvila.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorSpec:
    """One projector variant: how much it compresses along each side, and its layers for widths C and H."""

    rate: int
    plan: Callable[[int, int], list[nn.Module]]


class SpaceToChannel(nn.Module):
    """Fold every `rate` x `rate` cell of a square token grid into the channels of one token."""

    def __init__(self, rate: int) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Map (B, n*n, C) to (B, ceil(n/rate)^2, rate*rate*C); short edges are padded with zeros."""
        return space_to_channel(x_BNC, self.rate)


def space_to_channel(x_BNC: Tensor, rate: int) -> Tensor:
    """Compress tokens by folding cells of the grid into channels (paper section 2.1, spatial compression).

    Args:
        x_BNC: Features of square tiles, tokens in row-major order.
        rate: Side of a cell.

    Returns:
        Tensor of shape (B, ceil(n/rate)^2, rate*rate*C). Inside a token the cell is laid out row by row.

    Raises:
        ConfigError: The number of tokens is not a square.
    """
    b, num_tokens, c = x_BNC.shape
    n = isqrt(num_tokens)
    if n * n != num_tokens:
        raise ConfigError(f"space-to-channel needs a square token grid, got {num_tokens} tokens", "use square tiles")
    grid = x_BNC.view(b, n, n, c)
    if short := -n % rate:
        grid = nn.functional.pad(grid, (0, 0, 0, short, 0, short))
    m = (n + short) // rate
    # (B, m, rate, m, rate, C) -> (B, m, m, rate, rate, C)
    cells = grid.view(b, m, rate, m, rate, c).permute(0, 1, 3, 2, 4, 5)
    return cells.reshape(b, m * m, rate * rate * c)


def _mlp_2x2(c: int, h: int) -> list[nn.Module]:
    return [SpaceToChannel(2), nn.LayerNorm(4 * c), nn.Linear(4 * c, h), nn.GELU(), nn.Linear(h, h)]


def _mlp_3x3(c: int, h: int) -> list[nn.Module]:
    return [
        SpaceToChannel(3),
        nn.LayerNorm(9 * c),
        nn.Linear(9 * c, 3 * c),
        nn.GELU(),
        nn.LayerNorm(3 * c),
        nn.Linear(3 * c, h),
        nn.GELU(),
        nn.Linear(h, h),
    ]


def _mlp2x_gelu(c: int, h: int) -> list[nn.Module]:
    return [nn.Linear(c, h), nn.GELU(), nn.Linear(h, h)]


PROJECTORS: dict[str, ProjectorSpec] = {
    "mlp_downsample": ProjectorSpec(rate=2, plan=_mlp_2x2),
    "mlp_downsample_2x2_fix": ProjectorSpec(rate=2, plan=_mlp_2x2),
    "mlp_downsample_3x3_fix": ProjectorSpec(rate=3, plan=_mlp_3x3),
    "mlp2x_gelu": ProjectorSpec(rate=1, plan=_mlp2x_gelu),
}


def projector_spec(name: str) -> ProjectorSpec:
    """Look up a projector variant.

    Raises:
        ConfigError: The name is not in the table.
    """
    try:
        return PROJECTORS[name]
    except KeyError:
        raise ConfigError(f"unknown projector '{name}'", nearest(name, PROJECTORS)) from None


def num_output_tokens(name: str, grid: int) -> int:
    """Tokens that a projector leaves of a `grid` x `grid` tile."""
    return (-(-grid // projector_spec(name).rate)) ** 2


class MultimodalProjector(nn.Module):
    """The projector between tower and language model.

    Args:
        name: Variant in `PROJECTORS`.
        channels: Width C of the tower's features.
        hidden_size: Width H of the language model.
    """

    def __init__(self, name: str, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*projector_spec(name).plan(channels, hidden_size))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Map tile features (B, N, C) to visual tokens (B, N', H)."""
        y: Tensor = self.layers(x_BNC)
        return y
