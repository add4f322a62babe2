"""Generated clips for tiny video training: a coloured shape that moves over a pale ground, and questions about it.

What a clip shows follows from its number alone. Clips are animated GIFs of 64x64 pixels, a few kilobytes each; they
use so few colours that nothing is lost.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass

from nvila.data.records import Message, Part, Sample

SIZE = 64
NUM_FRAMES = 16
COLOURS = {"red": (200, 30, 30), "green": (30, 150, 60), "blue": (40, 60, 200), "black": (20, 20, 20)}
SHAPES = ("circle", "square")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

_GROUND = (236, 236, 228)
_STEP = 2
_FRAME_MS = 100


@dataclass(frozen=True, slots=True)
class Clip:
    """What one clip shows."""

    colour: str
    shape: str
    direction: str


def clip(number: int) -> Clip:
    """Return what the clip of a number shows."""
    choose = random.Random(f"moving-shapes {number}")
    return Clip(choose.choice(list(COLOURS)), choose.choice(SHAPES), choose.choice(list(DIRECTIONS)))


def gif(number: int) -> bytes:
    """Draw the clip of a number."""
    from PIL import Image, ImageDraw

    shown = clip(number)
    side = 18
    dx, dy = (_STEP * way for way in DIRECTIONS[shown.direction])
    # So that the way leads through the middle of the picture.
    left = (SIZE - side - dx * (NUM_FRAMES - 1)) // 2
    top = (SIZE - side - dy * (NUM_FRAMES - 1)) // 2
    frames = []
    for _ in range(NUM_FRAMES):
        frame = Image.new("RGB", (SIZE, SIZE), _GROUND)
        draw = ImageDraw.Draw(frame)
        outline = draw.ellipse if shown.shape == "circle" else draw.rectangle
        outline((left, top, left + side, top + side), fill=COLOURS[shown.colour])
        frames.append(frame.quantize(4))
        left, top = left + dx, top + dy
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=_FRAME_MS, loop=0, optimize=False)
    return buffer.getvalue()


def questions(number: int) -> Iterator[Sample]:
    """Yield the questions about the clip of a number; its key is `clip/<number>`."""
    shown = clip(number)
    asked = (
        ("direction", "which way does it move?", shown.direction),
        ("colour", "what color is it?", shown.colour),
        ("shape", "what shape is it?", shown.shape),
    )
    for kind, question, answer in asked:
        yield Sample(
            id=f"clip-{number:04d}-{kind}",
            source=f"clip_{kind}",
            messages=(
                Message(
                    role="user", content=(Part(type="video", value=key(number)), Part(type="text", value=question))
                ),
                Message(role="assistant", content=(Part(type="text", value=answer),)),
            ),
        )


def key(number: int) -> str:
    """Return the key of a clip."""
    return f"clip/{number:04d}"
