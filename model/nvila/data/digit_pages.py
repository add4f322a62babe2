"""Pages of small handwritten digits: a document task that low resolution cannot solve.

Four real digits of scikit-learn, 12 pixels high, stand near the corners of a page of 256x256 pixels. Scaled to 64x64 a
digit has three pixels. Digits of test pages are on no training page. The source of a question is its kind.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from functools import lru_cache

from nvila.data.digits_vqa import WORDS, DigitsVQA, Split
from nvila.data.records import Sample, vqa_sample

KINDS = ("corner", "yes_no_present")
PAGE, DIGIT = 256, 12
CORNERS = ("top left", "top right", "bottom left", "bottom right")
PAGES: dict[Split, int] = {"train": 4000, "test": 250}

# A digit's place in its quarter of the page, in pixels from the quarter's own corner.
_MARGIN, _SPREAD = 16, 84


class DigitPages:
    """The pages and the questions about them.

    Raises:
        CapabilityError: scikit-learn is not installed.
    """

    def __init__(self) -> None:
        self._digits = DigitsVQA()
        self._members: dict[Split, list[int]] = {"train": self._digits.members("train")}
        self._members["test"] = self._digits.members("test")

    def questions(self, split: Split) -> Iterator[Sample]:
        """Yield every question of a split, four a page; images are keyed `<split>/<page>`."""
        for page in range(PAGES[split]):
            key = f"{split}/{page}"
            for order, (kind, question, answer) in enumerate(_questions(key, self.shown(key))):
                yield vqa_sample(
                    id=f"{split}-{page:04d}-{order}", source=kind, image=key, question=question, answer=answer
                )

    def shown(self, key: str) -> list[int]:
        """Return the digits of a page, corner by corner in the order of `CORNERS`."""
        return [self._digits.digit(number) for number in self._numbers(key)]

    @lru_cache(maxsize=1)  # noqa: B019 - the questions about one follow each other
    def png(self, key: str) -> bytes:
        """Return a page as a PNG file of RGB pixels, black on white."""
        from PIL import Image, ImageOps

        choose = random.Random(f"digit-pages places {key}")
        page = Image.new("L", (PAGE, PAGE), 255)
        for corner, number in enumerate(self._numbers(key)):
            x, y = (_MARGIN + choose.randrange(_SPREAD) for _ in range(2))
            left, top = (PAGE // 2) * (corner % 2) + x, (PAGE // 2) * (corner // 2) + y
            page.paste(ImageOps.invert(self._digits.picture(number, DIGIT)), (left, top))
        buffer = io.BytesIO()
        page.convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()

    def _numbers(self, key: str) -> list[int]:
        """Return the numbers of the four images on a page."""
        split: Split = "test" if key.startswith("test/") else "train"
        return random.Random(f"digit-pages {key}").sample(self._members[split], len(CORNERS))


def _questions(key: str, shown: list[int]) -> Iterator[tuple[str, str, str]]:
    """Yield kind, question and answer: two corners, a digit that is there and one that is not."""
    choose = random.Random(f"digit-pages questions {key}")
    for corner in choose.sample(range(len(CORNERS)), 2):
        yield "corner", f"which digit is at the {CORNERS[corner]}?", WORDS[shown[corner]]
    absent = [digit for digit in range(len(WORDS)) if digit not in shown]
    for digit, answer in choose.sample([(choose.choice(shown), "yes"), (choose.choice(absent), "no")], 2):
        yield "yes_no_present", f"is there a {WORDS[digit]}?", answer
