from __future__ import annotations

import sys
from collections import Counter, defaultdict

import pytest

from nvila.data import easy_vqa
from nvila.data.records import Sample
from nvila.errors import CapabilityError

pytest.importorskip("easy_vqa", reason="the data set's package is an extra")


@pytest.fixture(scope="module")
def train() -> list[Sample]:
    return list(easy_vqa.questions("train"))


def expected_answer(question: str, color: str, shape: str) -> str:
    """Answer a question from the two facts of an image; written without looking at how the package's reader does."""
    words = set(question.rstrip("?").split())
    if question.startswith("what"):
        return color if "color" in words else shape
    asked = words & (set(easy_vqa.COLORS) | set(easy_vqa.SHAPES))
    negated = bool(words & {"no", "not"})
    return "yes" if (asked <= {color, shape}) != negated else "no"


def test_sizes_and_order_are_those_of_the_package(train: list[Sample]) -> None:
    from easy_vqa import get_train_questions

    texts, answers, images = get_train_questions()
    assert len(train) == 38_575
    assert [s.question for s in train] == list(texts)
    assert [s.answer for s in train] == list(answers)
    assert [s.images for s in train] == [(f"train/{image}",) for image in images]
    assert len({s.id for s in train}) == len(train)


def test_test_split_has_its_own_keys_and_ids(train: list[Sample]) -> None:
    test = list(easy_vqa.questions("test"))
    assert len(test) == 9_673
    assert not {s.images for s in test} & {s.images for s in train}
    assert not {s.id for s in test} & {s.id for s in train}
    assert Counter(s.source for s in test) == {
        "open_shape": 1257, "open_color": 1280, "yes_no_shape": 1935, "yes_no_color": 5201,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("what shape is in the image?", "open_shape"),
        ("what is the color of the shape?", "open_color"),
        ("is there a triangle?", "yes_no_shape"),
        ("is there not a teal shape in the image?", "yes_no_color"),
    ],
)
def test_kind_of_a_question(question: str, kind: str) -> None:
    assert easy_vqa.question_kind(question) == kind


def test_kind_fits_the_answers_given(train: list[Sample]) -> None:
    possible = {
        "open_shape": set(easy_vqa.SHAPES),
        "open_color": set(easy_vqa.COLORS),
        "yes_no_shape": {"yes", "no"},
        "yes_no_color": {"yes", "no"},
    }
    assert set(possible) == set(easy_vqa.KINDS)
    seen = defaultdict(set)
    for sample in train:
        seen[sample.source].add(sample.answer)
    assert seen == possible


def test_every_caption_answers_all_questions_of_its_image(train: list[Sample]) -> None:
    by_image = defaultdict(list)
    for sample in train:
        by_image[sample.images].append(sample)
    captions = list(easy_vqa.captions(train))
    assert len(captions) == len({caption.images for caption in captions}) > 3000
    for caption in captions:
        _, color, shape = caption.answer.split()
        for sample in by_image[caption.images]:
            assert sample.answer == expected_answer(sample.question, color, shape), (caption, sample)


def test_image_without_both_facts_gets_no_caption(train: list[Sample]) -> None:
    only_color = [s for s in train if s.source == "open_color"][:5]
    assert list(easy_vqa.captions(only_color)) == []


def test_every_image_file_exists_and_every_question_has_one(train: list[Sample]) -> None:
    files = dict(easy_vqa.image_files("train"))
    assert len(files) == 4000
    assert len(dict(easy_vqa.image_files("test"))) == 1000
    assert {key for s in train for key in s.images} <= files.keys()
    assert all(path.is_file() for path in files.values())


def test_validation_split_is_disjoint_by_image_complete_and_seeded(train: list[Sample]) -> None:
    kept, held = easy_vqa.split_validation(train, 200, seed=1)
    images, held_images = {s.images for s in kept}, {s.images for s in held}
    assert len(held_images) == 200
    assert not images & held_images
    assert sorted([*kept, *held], key=lambda s: s.id) == train
    assert easy_vqa.split_validation(train, 200, seed=1)[1] == held
    assert {s.images for s in easy_vqa.split_validation(train, 200, seed=2)[1]} != held_images


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(CapabilityError, match=r"easy-vqa is not installed.*nvila\[quickstart\]"):
        list(easy_vqa.questions("train"))


def test_text_holds_every_pair_of_question_and_answer_once_without_images(train: list[Sample]) -> None:
    texts = list(easy_vqa.text_only(train))
    pairs = [(text.question, text.answer) for text in texts]
    assert len(pairs) == len(set(pairs)) < 1000
    assert set(pairs) == {(sample.question, sample.answer) for sample in train}
    assert not any(text.images for text in texts)
    assert len({text.id for text in texts}) == len(texts)
