"""Data sets that come with packages, through the same interface as files."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from nvila.data import easy_vqa
from nvila.data.builtin import open_builtin
from nvila.data.digits_vqa import KINDS, SPLITS, WORDS, DigitsVQA
from nvila.data.images import load_image
from nvila.data.mixtures import Registry
from nvila.data.records import Sample
from nvila.errors import CapabilityError


@pytest.fixture(scope="module")
def digits() -> DigitsVQA:
    return DigitsVQA()


@pytest.mark.parametrize("name", ["easy-vqa:test", "digits-vqa:test"])
def test_ranges_are_slices_and_media_are_pictures(name: str) -> None:
    stream = open_builtin(name)
    everything = [(record.index, record.where, record.sample) for record in stream.records()]
    assert stream.count() == len(everything)
    assert [index for index, *_ in everything] == list(range(len(everything)))
    for start, stop in ((0, 3), (len(everything) - 2, None), (700, 705)):
        records = list(stream.records(start, stop))
        assert [(record.index, record.where, record.sample) for record in records] == everything[start:stop]
        for record in records:
            assert record.sample is not None
            assert record.sample.images == tuple(record.media)
            assert [load_image(source.read()).size for source in record.media.values()] == [(64, 64)]
    assert len({sample.id for *_, sample in everything if sample}) == len(everything)


def test_easy_vqa_is_the_package() -> None:
    stream = open_builtin("easy-vqa")
    [record] = stream.records(5, 6)
    expected = list(easy_vqa.questions("train"))[5]
    assert record.sample is not None
    assert (record.sample.id, record.sample.source) == (expected.id, expected.source)
    assert (record.sample.question, record.sample.answer) == (expected.question, expected.answer)
    assert record.sample.images == (f"easy-vqa/{expected.images[0]}",)
    assert (
        next(iter(record.media.values())).read() == dict(easy_vqa.image_files("train"))[expected.images[0]].read_bytes()
    )
    assert stream.count() == 38_575


def true_answer(sample: Sample, digit: int) -> str:
    *words, last = sample.question.rstrip("?").split()
    if sample.source == "open_digit":
        return WORDS[digit]
    if sample.source == "yes_no_digit":
        true = WORDS[digit] == last
    elif sample.source == "yes_no_parity":
        true = ("even", "odd")[digit % 2] == last
    else:
        true = digit > int(last) if "larger" in words else digit < int(last)
    return "yes" if true else "no"


def test_answers_about_digits_are_true(digits: DigitsVQA) -> None:
    for split in SPLITS:
        for sample in digits.questions(split):
            digit = digits._digits[int(sample.images[0].rpartition("/")[2])]
            assert sample.answer == true_answer(sample, digit)


def test_digits_are_split_by_image_and_asked_about_evenly(digits: DigitsVQA) -> None:
    train, test = (digits.members(split) for split in SPLITS)
    assert sorted(train + test) == list(range(1797))
    assert len(test) == 359
    samples = list(digits.questions("train"))
    assert Counter(sample.source for sample in samples) == {
        "open_digit": 1438, "yes_no_digit": 2876, "yes_no_parity": 1438, "yes_no_order": 2876,
    }  # fmt: skip
    assert set(KINDS) == {sample.source for sample in samples}
    for kind in KINDS[1:]:
        answers = Counter(sample.answer for sample in samples if sample.source == kind)
        assert 0.4 < answers["yes"] / answers.total() < 0.6


def test_digits_are_the_same_everywhere(digits: DigitsVQA) -> None:
    text = "\n".join(f"{sample.id} {sample.question} {sample.answer}" for sample in digits.questions("test"))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "45a639247f6ad469"
    pixels = load_image(digits.png(0)).tobytes()
    assert hashlib.sha256(pixels).hexdigest()[:16] == "a8f44cd24462a663"


def test_digits_are_white_on_black_in_the_middle(digits: DigitsVQA) -> None:
    image = load_image(digits.png(0)).convert("L")
    assert image.getpixel((0, 0)) == 0
    assert max(image.tobytes()) > 200


def test_a_mixture_of_both_has_no_key_twice() -> None:
    stream = Registry().open("digits-vqa:test + easy-vqa:test")
    keys = {key for record in stream.records() for key in record.media}
    assert len(keys) == 359 + 1000
    assert stream.count() == 359 * 6 + 9_673


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(CapabilityError, match="scikit-learn is not installed"):
        open_builtin("digits-vqa")
