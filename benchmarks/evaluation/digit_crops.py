"""Tiles with one digit, for the first stage of training: a model learns what digits are called."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from functools import cached_property

from nvila.data.digits_vqa import WORDS, DigitsVQA
from nvila.data.records import Sample, vqa_sample

PREFIX = "crop"


@dataclass(frozen=True, kw_only=True)
class Crops:
    """One tile for every digit of the training split.

    Args:
        tile: Side of a tile in pixels.
        digit: Side of a digit, as large as the model sees it later.
        drawn: Side at which it is drawn before it is brought to that size.
        inverted: Black on white, as on pages; else white on black, as in clips.
    """

    tile: int
    digit: int
    drawn: int
    inverted: bool

    @cached_property
    def _digits(self) -> DigitsVQA:
        return DigitsVQA()

    @cached_property
    def _members(self) -> list[int]:
        return self._digits.members("train")

    def samples(self) -> list[Sample]:
        """Return a question about every tile."""
        return [
            vqa_sample(
                id=f"{PREFIX}-{n}",
                source=PREFIX,
                image=f"{PREFIX}/{n}",
                question="which digit is this?",
                answer=WORDS[self._digits.digit(number)],
            )
            for n, number in enumerate(self._members)
        ]

    def png(self, key: str) -> bytes:
        """Draw a tile with its digit at a random place."""
        from PIL import Image, ImageOps

        number = self._members[int(key.partition("/")[2])]
        draw = random.Random(key)
        tile = Image.new("L", (self.tile, self.tile), 255 if self.inverted else 0)
        picture = self._digits.picture(number, self.drawn).resize((self.digit,) * 2, Image.Resampling.BICUBIC)
        room = self.tile - self.digit
        tile.paste(ImageOps.invert(picture) if self.inverted else picture, (draw.randrange(room), draw.randrange(room)))
        buffer = io.BytesIO()
        tile.convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()
