"""A picture of how images are tiled: each image, and beside it every grid that it is laid on."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from nvila.vision.tiling import Grid, TilePlan

_PANEL = 360
_GAP = 24
_CAPTION = 26
_PAPER = (255, 255, 255)
_INK = (32, 33, 36)
_LINE = (255, 196, 0)


def draw_tilings(images: Sequence[Image.Image], plans: Sequence[TilePlan], tile_size: int) -> Image.Image:
    """Draw the tilings of RGB images below each other.

    Args:
        images: The images.
        plans: The plan of each.
        tile_size: Side of a tile in pixels, for the captions.

    Returns:
        An RGB picture: a row for each image, which shows it as it is and then warped to each grid of its plan, with
        the tiles numbered in the order in which the vision tower gets them.
    """
    rows = [_row(image, plan, tile_size) for image, plan in zip(images, plans, strict=True)]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), _PAPER)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _row(image: Image.Image, plan: TilePlan, tile_size: int) -> Image.Image:
    panels = [(_fitted(image, *image.size), f"{image.width} x {image.height} pixels")]
    first = 1
    for grid in plan.grids:
        panels.append((_gridded(image, grid, first), _caption(grid, first, tile_size)))
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


def _gridded(image: Image.Image, grid: Grid, first: int) -> Image.Image:
    """Warp an image to a grid, as cutting does, and draw the tiles; narrow grids keep readable tiles."""
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
