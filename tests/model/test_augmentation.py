from __future__ import annotations

import torch

from nvila.training.augmentation import random_shift


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shifted(tile: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Move a picture by looking up, for every target pixel, the nearest source pixel."""
    height, width = tile.shape[1:]
    rows = (torch.arange(height) - down).clamp(0, height - 1)
    columns = (torch.arange(width) - right).clamp(0, width - 1)
    return tile[:, rows][:, :, columns]


def test_no_shift_returns_the_tiles_themselves() -> None:
    tiles = torch.randn(2, 3, 8, 8)
    assert random_shift(tiles, 0, noise(0)) is tiles


def test_every_tile_is_one_of_the_possible_translations_and_all_occur() -> None:
    tile = torch.randn(3, 6, 7, generator=noise(1))
    moves = {(down, right): shifted(tile, down, right) for down in range(-2, 3) for right in range(-2, 3)}
    found = set()
    for moved in random_shift(tile.expand(400, 3, 6, 7), 2, noise(2)):
        hits = [move for move, expected in moves.items() if torch.equal(moved, expected)]
        assert len(hits) == 1
        found.add(hits[0])
    assert found == set(moves)


def test_tiles_move_on_their_own_and_keep_their_content() -> None:
    tiles = torch.stack([torch.full((3, 4, 4), float(value)) for value in range(5)])
    assert torch.equal(random_shift(tiles, 3, noise(0)), tiles)


def test_no_tiles_stay_no_tiles() -> None:
    assert random_shift(torch.empty(0, 3, 1, 1), 2, noise(0)).shape == (0, 3, 1, 1)


def test_the_generator_fixes_the_shifts() -> None:
    tiles = torch.randn(4, 3, 8, 8)
    first, second = (random_shift(tiles, 2, noise(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, random_shift(tiles, 2, noise(6)))
