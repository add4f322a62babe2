"""Pages of handwritten digits: a document task that low resolution cannot solve, and the same in large print.

Four real digits of scikit-learn, 12 pixels high, stand near the corners of a page of 256x256 pixels. Scaled to 64x64 a
digit has three pixels. In large print a page shows one digit, 192 pixels high, that a model can read
which sees a small tile. Digits of test pages are on no training page. The source of a question is its kind.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from nvila.data.digits_vqa import WORDS, DigitsVQA, Split
from nvila.data.records import Sample, vqa_sample

KINDS = ("corner", "yes_no_present")
LARGE_KINDS = ("digit", "yes_no_present")
PAGE, DIGIT, LARGE_DIGIT = 256, 12, 192
CORNERS = ("top left", "top right", "bottom left", "bottom right")
PAGES: dict[Split, int] = {"train": 4000, "test": 250}


@dataclass(frozen=True, slots=True, kw_only=True)
class Print:
    """What a page looks like.

    Args:
        digit: Side of a digit in pixels.
        margin: Pixels between a digit and the edges of its field, at least.
        kind: Kind of the question about one place.
        side: Side of a field in pixels.
        fields: Left and top of the fields that have a digit each, by the names of their places.
    """

    digit: int
    margin: int
    kind: str
    side: int
    fields: dict[str, tuple[int, int]]


SMALL = Print(
    digit=DIGIT,
    margin=16,
    kind=KINDS[0],
    side=PAGE // 2,
    fields={
        f"at the {name}": (PAGE // 2 * (number % 2), PAGE // 2 * (number // 2)) for number, name in enumerate(CORNERS)
    },
)
LARGE = Print(digit=LARGE_DIGIT, margin=8, kind=LARGE_KINDS[0], side=PAGE, fields={"on the page": (0, 0)})


class DigitPages:
    """The pages and the questions about them.

    Args:
        print: `SMALL` or `LARGE`.

    Raises:
        CapabilityError: scikit-learn is not installed.
    """

    def __init__(self, print: Print = SMALL) -> None:
        self._digits = DigitsVQA()
        self._print = print
        self._members: dict[Split, list[int]] = {"train": self._digits.members("train")}
        self._members["test"] = self._digits.members("test")

    def questions(self, split: Split) -> Iterator[Sample]:
        """Yield every question of a split, page by page; images are keyed `<split>/<page>`."""
        for page in range(PAGES[split]):
            key = f"{split}/{page}"
            for order, (kind, question, answer) in enumerate(self._questions(key)):
                yield vqa_sample(
                    id=f"{split}-{page:04d}-{order}", source=kind, image=key, question=question, answer=answer
                )

    def shown(self, key: str) -> list[int]:
        """Return the digits of a page, place by place, in small print in the order of `CORNERS`."""
        return [self._digits.digit(number) for number in self._numbers(key)]

    @lru_cache(maxsize=1)  # noqa: B019 - the questions about one follow each other
    def png(self, key: str) -> bytes:
        """Return a page as a PNG file of RGB pixels, black on white."""
        from PIL import Image, ImageOps

        choose = random.Random(f"digit-pages places {key}")
        page = Image.new("L", (PAGE, PAGE), 255)
        spread = self._print.side - 2 * self._print.margin - self._print.digit
        for number, (left, top) in zip(self._numbers(key), self._print.fields.values(), strict=True):
            x, y = (self._print.margin + choose.randrange(spread) for _ in range(2))
            page.paste(ImageOps.invert(self._digits.picture(number, self._print.digit)), (left + x, top + y))
        buffer = io.BytesIO()
        page.convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()

    def _numbers(self, key: str) -> list[int]:
        """Return the numbers of the images on a page."""
        split: Split = "test" if key.startswith("test/") else "train"
        return random.Random(f"digit-pages {key}").sample(self._members[split], len(self._print.fields))

    def _questions(self, key: str) -> Iterator[tuple[str, str, str]]:
        """Yield kind, question and answer: two places or the only one, a digit that is there, one that is not."""
        shown, places = self.shown(key), tuple(self._print.fields)
        choose = random.Random(f"digit-pages questions {key}")
        for place in choose.sample(range(len(places)), min(2, len(places))):
            yield self._print.kind, f"which digit is {places[place]}?", WORDS[shown[place]]
        absent = [digit for digit in range(len(WORDS)) if digit not in shown]
        for digit, answer in choose.sample([(choose.choice(shown), "yes"), (choose.choice(absent), "no")], 2):
            yield "yes_no_present", f"is there a {WORDS[digit]}?", answer
