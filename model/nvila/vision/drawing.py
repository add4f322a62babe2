"""A picture of how images are tiled: each image, and beside it every grid that it is laid on."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nvila.vision.tiling import Grid, TilePlan, TilingConfig, cut_tiles

_PANEL = 360
_GAP = 24
_CAPTION = 26
_PAPER = (255, 255, 255)
_INK = (32, 33, 36)
_LINE = (255, 196, 0)


def draw_tilings(images: Sequence[Image.Image], plans: Sequence[TilePlan], config: TilingConfig) -> Image.Image:
    """Draw the tilings of RGB images below each other.

    Args:
        images: The images.
        plans: The plan of each.
        config: The tiling that made the plans.

    Returns:
        An RGB picture: a row for each image, which shows it as it is and then the tiles of each grid of its plan,
        numbered in the order in which the vision tower gets them.
    """
    rows = [_row(image, plan, config) for image, plan in zip(images, plans, strict=True)]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), _PAPER)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _row(image: Image.Image, plan: TilePlan, config: TilingConfig) -> Image.Image:
    panels = [(_fitted(image, *image.size), f"{image.width} x {image.height} pixels")]
    tiles_T3HW = cut_tiles(image, plan, config)
    first = 1
    for grid in plan.grids:
        tiles = tiles_T3HW[first - 1 : first - 1 + grid.num_tiles]
        panels.append((_gridded(_joined(tiles, grid), grid, first), _caption(grid, first, config.tile_size)))
        first += grid.num_tiles
    widths = [max(panel.width, 7 * len(caption)) for panel, caption in panels]
    height = max(panel.height for panel, _ in panels)
    row = Image.new("RGB", (sum(widths) + _GAP * (len(panels) + 1), height + _CAPTION + 2 * _GAP), _PAPER)
    draw = ImageDraw.Draw(row)
    left = _GAP
    for (panel, caption), width in zip(panels, widths, strict=True):
        row.paste(panel, (left, _GAP))
        draw.text((left, _GAP + panel.height + 6), caption, fill=_INK, font=_font(13))
        left += width + _GAP
    return row


def _caption(grid: Grid, first: int, tile_size: int) -> str:
    if grid.num_tiles == 1:
        return f"tile {first}: {tile_size} x {tile_size}"
    last = first + grid.num_tiles - 1
    return f"tiles {first}-{last}: {grid.columns} x {grid.rows} of {tile_size}"


def _joined(tiles_T3HW: Tensor, grid: Grid) -> Image.Image:
    """Put the tiles of a grid side by side again."""
    size = tiles_T3HW.shape[-1]
    # (rows, columns, 3, size, size) -> (rows, size, columns, size, 3)
    cells = tiles_T3HW.view(grid.rows, grid.columns, 3, size, size).permute(0, 3, 1, 4, 2)
    return Image.fromarray(cells.reshape(grid.rows * size, grid.columns * size, 3).numpy())


def _gridded(image: Image.Image, grid: Grid, first: int) -> Image.Image:
    """Scale joined tiles to a panel and draw their borders and numbers."""
    panel = _fitted(image, *grid)
    draw = ImageDraw.Draw(panel)
    for number in range(grid.num_tiles):
        row, column = divmod(number, grid.columns)
        x, y = column * panel.width // grid.columns, row * panel.height // grid.rows
        right, bottom = (column + 1) * panel.width // grid.columns - 1, (row + 1) * panel.height // grid.rows - 1
        draw.rectangle((x, y, right, bottom), outline=_LINE, width=2)
        draw.text((x + 5, y + 4), str(first + number), fill=_LINE, font=_font(14), stroke_width=2, stroke_fill=_INK)
    return panel


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale to the proportions width : height inside a panel."""
    longest = max(width, height)
    size = (max(1, _PANEL * width // longest), max(1, _PANEL * height // longest))
    return image.resize(size, Image.Resampling.BICUBIC)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
