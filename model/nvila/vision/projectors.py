"""Projectors: token compression by space-to-channel, then a small MLP into the language model's width.

A projector is a row of `PROJECTORS`; to add one, add a row. Released checkpoints name their parameters
`layers.<index>` (`linear`: `layers`), so the order of a plan, the parameter-free steps included, is part of the format.

Shape suffixes: B tiles, N tokens of a tile, C channels of the tower, H width of the language model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import isqrt

from torch import Tensor, nn

from nvila.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorSpec:
    """One projector variant: how much it compresses along each side, and its layers for widths C and H."""

    rate: int
    plan: Callable[[int, int], nn.Module]


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
    grid = x_BNC.reshape(b, n, n, c)
    if short := -n % rate:
        grid = nn.functional.pad(grid, (0, 0, 0, short, 0, short))
    m = (n + short) // rate
    # (B, m, rate, m, rate, C) -> (B, m, m, rate, rate, C)
    cells = grid.reshape(b, m, rate, m, rate, c).permute(0, 1, 3, 2, 4, 5)
    return cells.reshape(b, m * m, rate * rate * c)


def _mlp_2x2(c: int, h: int) -> nn.Module:
    return nn.Sequential(SpaceToChannel(2), nn.LayerNorm(4 * c), nn.Linear(4 * c, h), nn.GELU(), nn.Linear(h, h))


def _mlp_3x3(c: int, h: int) -> nn.Module:
    return _normed_mlp(3, [9 * c, 3 * c], h)


def _mlp_3x3_s2(c: int, h: int) -> nn.Module:
    return _normed_mlp(3, [9 * c, 3 * c, c, c // 3], h)


def _mlp_3x3_s2_new(c: int, h: int) -> nn.Module:
    return _normed_mlp(3, [9 * c, 4 * c, 2 * c, c, c // 3], h)


def _normed_mlp(rate: int, widths: list[int], h: int) -> nn.Module:
    """Fold cells, step down through `widths` to H with a norm before every step, and mix once more at width H."""
    layers: list[nn.Module] = [SpaceToChannel(rate)]
    for wide, narrow in pairwise([*widths, h]):
        layers += [nn.LayerNorm(wide), nn.Linear(wide, narrow), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(h, h))


def _linear(c: int, h: int) -> nn.Module:
    return nn.Linear(c, h)


def _identity(c: int, h: int) -> nn.Module:
    if c != h:
        raise ConfigError(
            f"projector 'identity' cannot turn {c} channels into the {h} of the language model", "use 'linear'"
        )
    return nn.Identity()


def _mlp_gelu(depth: int, c: int, h: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(c, h)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(h, h)]
    return nn.Sequential(*layers)


# The two `3x3_s2` rows compress as much as their layers do; the reference announces nine times as many tokens.
PROJECTORS: dict[str, ProjectorSpec] = {
    "identity": ProjectorSpec(rate=1, plan=_identity),
    "linear": ProjectorSpec(rate=1, plan=_linear),
    "mlp2x_gelu": ProjectorSpec(rate=1, plan=partial(_mlp_gelu, 2)),
    "mlp_downsample": ProjectorSpec(rate=2, plan=_mlp_2x2),
    "mlp_downsample_2x2_fix": ProjectorSpec(rate=2, plan=_mlp_2x2),
    "mlp_downsample_3x3_fix": ProjectorSpec(rate=3, plan=_mlp_3x3),
    "mlp_downsample_3x3_s2": ProjectorSpec(rate=3, plan=_mlp_3x3_s2),
    "mlp_downsample_3x3_s2_new": ProjectorSpec(rate=3, plan=_mlp_3x3_s2_new),
}
# The depth of an uncompressed MLP is part of its name; two digits, because a typing error must not build a tower.
_MLP_GELU = re.compile(r"mlp([1-9]\d?)x_gelu")


def projector_spec(name: str) -> ProjectorSpec:
    """Look up a projector variant: a row of `PROJECTORS`, or `mlp<depth>x_gelu` of any depth.

    Raises:
        ConfigError: The name is not in the table.
    """
    if name in PROJECTORS:
        return PROJECTORS[name]
    if match := _MLP_GELU.fullmatch(name):
        return ProjectorSpec(rate=1, plan=partial(_mlp_gelu, int(match[1])))
    raise ConfigError(f"unknown projector '{name}'", nearest(name, PROJECTORS))


def num_output_tokens(name: str, grid: int) -> int:
    """Tokens that a projector leaves of a `grid` x `grid` tile."""
    return (-(-grid // projector_spec(name).rate)) ** 2


class MultimodalProjector(nn.Module):
    """The projector between tower and language model.

    Args:
        name: Variant in `PROJECTORS`.
        channels: Width C of the tower's features.
        hidden_size: Width H of the language model.

    Raises:
        ConfigError: The variant is unknown or cannot join these widths.
    """

    def __init__(self, name: str, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.layers = projector_spec(name).plan(channels, hidden_size)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Map tile features (B, N, C) to visual tokens (B, N', H)."""
        y: Tensor = self.layers(x_BNC)
        return y
