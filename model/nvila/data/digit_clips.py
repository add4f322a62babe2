"""Clips of handwritten digits, one after the other: order, number and moments in a video.

Two to four different digits of scikit-learn are shown in turn for half a second to one and a half, with black between
them, in clips of eight seconds at four frames a second. Few sampled frames miss digits. Digits of test clips are in no
training clip. The source of a question is its kind.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache

from nvila.data.digits_vqa import WORDS, DigitsVQA, Split
from nvila.data.encoding import encode_video
from nvila.data.records import Message, Part, Sample

WORD_KINDS = ("count", "first", "last", "after")
SPAN_KINDS = ("when",)
RATE, SECONDS, SIZE, DIGIT = 4, 8, 64, 40
FRAMES = RATE * SECONDS
CLIPS: dict[Split, int] = {"train": 2000, "test": 200}

_SHORTEST, _LONGEST = RATE // 2, RATE + RATE // 2


@dataclass(frozen=True, slots=True)
class Showing:
    """One digit of a clip: image `number` from frame `start` up to, not including, `end`."""

    number: int
    start: int
    end: int


class DigitClips:
    """The clips and the questions about them.

    Raises:
        CapabilityError: scikit-learn is not installed.
    """

    def __init__(self) -> None:
        self._digits = DigitsVQA()
        self._members: dict[tuple[Split, int], list[int]] = defaultdict(list)  # by what they are
        for split in CLIPS:
            for number in self._digits.members(split):
                self._members[split, self._digits.digit(number)].append(number)

    def questions(self, split: Split, kinds: Collection[str] = (*WORD_KINDS, *SPAN_KINDS)) -> Iterator[Sample]:
        """Yield the questions of some kinds about the clips of a split; videos are keyed `<split>/<clip>`."""
        for clip in range(CLIPS[split]):
            key = f"{split}/{clip}"
            for order, (kind, question, answer) in enumerate(self._asked(key)):
                if kind in kinds:
                    yield _sample(f"{split}-{clip:04d}-{order}", kind, key, question, answer)

    def showings(self, key: str) -> list[Showing]:
        """Return what a clip shows, in order."""
        split: Split = "test" if key.startswith("test/") else "train"
        choose = random.Random(f"digit-clips {key}")
        wanted = choose.sample(range(len(WORDS)), choose.randint(2, 4))
        numbers = [choose.choice(self._members[split, digit]) for digit in wanted]
        lengths = [choose.randint(_SHORTEST, _LONGEST) for _ in numbers]
        # What is left of the clip is shared out before, between and after; one black frame at least between two.
        spare = FRAMES - sum(lengths) - (len(numbers) - 1)
        cuts = sorted(choose.randint(0, spare) for _ in numbers)
        found, at = [], 0
        for number, length, cut, before in zip(numbers, lengths, cuts, [0, *cuts], strict=False):
            start = at + cut - before
            found.append(Showing(number, start, start + length))
            at = start + length + 1
        return found

    @lru_cache(maxsize=1)  # noqa: B019 - the questions about one follow each other
    def mp4(self, key: str) -> bytes:
        """Return a clip as an MP4 file of 64x64 pixels, white on black."""
        from PIL import Image

        black = Image.new("RGB", (SIZE, SIZE))
        frames = [black] * FRAMES
        for shown in self.showings(key):
            frame = black.copy()
            frame.paste(self._digits.picture(shown.number, DIGIT), ((SIZE - DIGIT) // 2,) * 2)
            frames[shown.start : shown.end] = [frame] * (shown.end - shown.start)
        return encode_video(frames, rate=RATE)

    def _asked(self, key: str) -> Iterator[tuple[str, str, str]]:
        shown = self.showings(key)
        words = [WORDS[self._digits.digit(one.number)] for one in shown]
        yield "count", "how many digits are shown?", WORDS[len(words)]
        yield "first", "which digit comes first?", words[0]
        yield "last", "which digit comes last?", words[-1]
        choose = random.Random(f"digit-clips questions {key}")
        place = choose.randrange(len(words) - 1)
        yield "after", f"which digit comes after the {words[place]}?", words[place + 1]
        at = choose.randrange(len(words))
        yield "when", f"when is the {words[at]} shown?", f"<{shown[at].start / RATE}> <{shown[at].end / RATE}>"


def _sample(id: str, kind: str, key: str, question: str, answer: str) -> Sample:
    asked = (Part(type="video", value=key), Part(type="text", value=question))
    said = (Part(type="text", value=answer),)
    return Sample(
        id=id,
        source=kind,
        messages=(Message(role="user", content=asked), Message(role="assistant", content=said)),
    )
