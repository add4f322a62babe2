"""Pages and clips of digits: what they show is what their answers say."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from nvila.data.builtin import open_builtin
from nvila.data.digit_clips import FRAMES, RATE, SECONDS, DigitClips
from nvila.data.digit_pages import CORNERS, DIGIT, LARGE, LARGE_DIGIT, PAGE, PAGES, DigitPages
from nvila.data.digits_vqa import WORDS, DigitsVQA
from nvila.data.images import load_image
from nvila.data.records import Sample
from nvila.data.video import load_video


@pytest.fixture(scope="module")
def digits() -> DigitsVQA:
    return DigitsVQA()


@pytest.fixture(scope="module")
def clips() -> DigitClips:
    return DigitClips()


def test_a_page_shows_its_answers_at_its_corners(digits: DigitsVQA) -> None:
    pages = DigitPages()
    corners = [sample for sample in pages.questions("test") if sample.source == "corner"][:12]
    for sample in corners:
        page = np.asarray(load_image(pages.png(sample.images[0])).convert("L")).astype(int)
        assert page.shape == (PAGE, PAGE)
        corner = next(place for place, name in enumerate(CORNERS) if name in sample.question)
        half = PAGE // 2
        rows, columns = (np.arange(half) + half * (corner // 2), np.arange(half) + half * (corner % 2))
        quarter = 255 - page[np.ix_(rows, columns)]
        # The only ink of the quarter is one image of the answered digit.
        same = [
            number
            for number in digits.members("test")
            if (np.asarray(digits.picture(number, DIGIT)).astype(int).sum() == quarter.sum())
            and WORDS[digits.digit(number)] == sample.answer
        ]
        assert same


def test_pages_ask_for_what_is_there_and_for_what_is_not() -> None:
    samples = list(DigitPages().questions("test"))
    assert len(samples) == 4 * PAGES["test"]
    assert len({sample.id for sample in samples}) == len(samples)
    present = Counter(sample.answer for sample in samples if sample.source == "yes_no_present")
    assert present == {"yes": PAGES["test"], "no": PAGES["test"]}
    assert [sample.to_dict() for sample in DigitPages().questions("test")] == [sample.to_dict() for sample in samples]


def test_a_page_in_large_print_shows_its_one_digit(digits: DigitsVQA) -> None:
    stream = open_builtin("digit-pages-large:test")
    assert stream.count() == 3 * PAGES["test"]
    pages, places = DigitPages(LARGE), set()
    for record in stream.records(0, 30):
        assert record.sample is not None
        [(key, media)] = record.media.items()
        [shown] = pages.shown(key.partition("/")[2])
        page = 255 - np.asarray(load_image(media.read()).convert("L")).astype(int)
        assert page.shape == (PAGE, PAGE)
        inked = np.argwhere(page > 128)
        assert (np.ptp(inked, axis=0) < LARGE_DIGIT).all()
        places.add(tuple(inked.min(axis=0)))
        kinds = {"digit": WORDS[shown], "yes_no_present": "yes" if WORDS[shown] in record.sample.question else "no"}
        assert record.sample.answer == kinds[record.sample.source]
    assert len(places) == 10  # another one on every page


def asked(clips: DigitClips, kind: str, key: str) -> Sample:
    return next(
        sample
        for sample in clips.questions("test", [kind])
        if any(part.value == key for message in sample.messages for part in message.content)
    )


def test_a_clip_shows_its_digits_in_order(clips: DigitClips, digits: DigitsVQA) -> None:
    for key in ("test/0", "test/1", "test/2", "test/7"):
        shown = clips.showings(key)
        words = [WORDS[digits.digit(one.number)] for one in shown]
        assert len(set(words)) == len(words)
        assert asked(clips, "count", key).answer == WORDS[len(words)]
        assert asked(clips, "first", key).answer == words[0]
        assert asked(clips, "last", key).answer == words[-1]
        after = asked(clips, "after", key)
        before = next(place for place, word in enumerate(words) if f" {word}?" in after.question)
        assert after.answer == words[before + 1]
        when = asked(clips, "when", key)
        one = next(one for one, word in zip(shown, words, strict=True) if f" {word} " in when.question)
        assert when.answer == f"<{one.start / RATE}> <{one.end / RATE}>"
        # A frame is bright while a digit is shown, and black between two.
        video = load_video(clips.mp4(key), num_frames=FRAMES)
        assert video.duration == pytest.approx(SECONDS)
        bright = [int(frame.max()) > 128 for frame in video.frames]
        assert bright == [any(one.start <= at < one.end for one in shown) for at in range(FRAMES)]


def test_all_clips_hold_what_they_show(clips: DigitClips) -> None:
    for number in range(200):
        shown = clips.showings(f"test/{number}")
        assert 2 <= len(shown) <= 4
        assert shown[0].start >= 0
        assert shown[-1].end <= FRAMES
        assert all(a.end < b.start for a, b in pairwise(shown))


def test_parts_share_no_digits(clips: DigitClips, digits: DigitsVQA) -> None:
    train, test = (set(digits.members(split)) for split in ("train", "test"))
    assert {one.number for n in range(50) for one in clips.showings(f"train/{n}")} <= train
    assert {one.number for n in range(50) for one in clips.showings(f"test/{n}")} <= test


def test_clips_are_videos_of_a_stream() -> None:
    stream = open_builtin("digit-clips-when:test")
    [record] = stream.records(4, 5)
    assert record.sample is not None
    [(key, media)] = record.media.items()
    assert key == "digit-clips-when/test/4"
    assert record.sample.messages[0].content[0].value == key
    assert media.read() == DigitClips().mp4("test/4")
