"""Handwritten digits as questions and answers: 1,797 real images of scikit-learn, six questions about each.

The package carries the images (8x8 pixels, 16 levels, from 43 writers), so nothing is downloaded; they are shown at
64x64. The source of a question is its kind. Which image is in which split, and what is asked about it, is fixed.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from nvila.data.records import Sample, vqa_sample
from nvila.errors import CapabilityError

if TYPE_CHECKING:
    from PIL import Image

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KINDS = ("open_digit", "yes_no_digit", "yes_no_parity", "yes_no_order")
SIZE = 64

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
SPLIT_SEED = 0
TEST_SHARE = 0.2

_LEVELS = 16


class DigitsVQA:
    """The digits and the questions about them.

    Raises:
        CapabilityError: scikit-learn is not installed.
    """

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as e:
            raise CapabilityError("the package scikit-learn is not installed", "pip install 'nvila[curate]'") from e
        bunch = load_digits()
        self._images: Any = bunch.images  # (1797, 8, 8), levels 0..16
        self._digits: list[int] = bunch.target.tolist()

    def members(self, split: Split) -> list[int]:
        """Return the numbers of the images of a split, in order."""
        everything = range(len(self._digits))
        test = set(random.Random(SPLIT_SEED).sample(everything, round(TEST_SHARE * len(everything))))
        return [number for number in everything if (number in test) == (split == "test")]

    def questions(self, split: Split) -> Iterator[Sample]:
        """Yield every question of a split; images are keyed `<split>/<number>`."""
        for number in self.members(split):
            for order, (kind, question, answer) in enumerate(_questions(number, self._digits[number])):
                yield vqa_sample(
                    id=f"{split}-{number:04d}-{order}",
                    source=kind,
                    image=f"{split}/{number}",
                    question=question,
                    answer=answer,
                )

    def png(self, number: int) -> bytes:
        """Return an image as a PNG file of 64x64 RGB pixels, white on black."""
        buffer = io.BytesIO()
        self.picture(number, SIZE).convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()

    def picture(self, number: int, size: int) -> Image.Image:
        """Return an image of `size` x `size` grey pixels, white on black."""
        import numpy as np
        from PIL import Image

        levels = (self._images[number] * (255 / _LEVELS)).round().astype(np.uint8)
        return Image.fromarray(levels).resize((size, size), Image.Resampling.BILINEAR)

    def digit(self, number: int) -> int:
        """Return the digit that an image shows."""
        return self._digits[number]


def _questions(number: int, digit: int) -> Iterator[tuple[str, str, str]]:
    """Yield kind, question and answer; two of the three kinds of yes or no come twice."""
    choose = random.Random(f"digits-vqa {number}")  # a text, because its seeds differ in every bit
    yield "open_digit", "which digit is this?", WORDS[digit]
    others = [other for other in range(len(WORDS)) if other != digit]
    for asked in choose.sample([digit, choose.choice(others)], 2):
        yield "yes_no_digit", f"is it {WORDS[asked]}?", _yes(asked == digit)
    parity = choose.choice(("odd", "even"))
    yield "yes_no_parity", f"is it {parity}?", _yes((digit % 2 == 1) == (parity == "odd"))
    larger, smaller = choose.randrange(0, 9), choose.randrange(1, 10)
    yield "yes_no_order", f"is it larger than {larger}?", _yes(digit > larger)
    yield "yes_no_order", f"is it smaller than {smaller}?", _yes(digit < smaller)


def _yes(true: bool) -> str:
    return "yes" if true else "no"
