"""Scores of short answers, on cases worked by hand."""

from __future__ import annotations

import math

import pytest

from nvila.data.records import Sample, vqa_sample
from nvila.evaluation.scores import (
    Tally,
    blind_baselines,
    exact_match,
    normalize_answer,
    paired_difference,
    tally_by_source,
)


def sample(question: str, answer: str, source: str = "s") -> Sample:
    return vqa_sample(id=f"{question}-{answer}", source=source, image="i", question=question, answer=answer)


@pytest.mark.parametrize(
    ("prediction", "answer", "same"),
    [
        ("Red", "red", True),
        ("red.", "red", True),
        ("  dark   red ", "dark red", True),
        ("reddish", "red", False),
        ("", "red", False),
    ],
)
def test_exact_match(prediction: str, answer: str, same: bool) -> None:
    assert exact_match(prediction, answer) is same


def test_only_the_final_period_goes() -> None:
    assert normalize_answer("3.5.") == "3.5"


def test_tallies_count_by_source() -> None:
    samples = [sample("q", "a", "x"), sample("q", "b", "y"), sample("q", "c", "x")]
    assert tally_by_source(samples, [True, False, False]) == {
        "x": Tally(correct=1, total=2),
        "y": Tally(correct=0, total=1),
    }


def test_an_empty_tally_has_no_accuracy() -> None:
    assert Tally(correct=0, total=0).accuracy == 0.0


def test_blind_baselines_use_training_statistics_only() -> None:
    train = [sample("shape?", "circle"), sample("shape?", "circle"), sample("red?", "no"), sample("red?", "yes")]
    train += [sample("red?", "no"), sample("blue?", "no")]
    test = [sample("shape?", "circle"), sample("red?", "no"), sample("new?", "no"), sample("red?", "yes")]
    majority, by_question = blind_baselines(train, test)
    assert majority == [False, True, True, False]
    assert by_question == [True, True, True, False]


def test_paired_difference_by_hand() -> None:
    reference = [True] * 80 + [False] * 20
    candidate = [True] * 74 + [False] * 6 + [True] * 2 + [False] * 18
    found = paired_difference(reference, candidate)
    assert (found.worse, found.better) == (6, 2)
    assert found.drop == pytest.approx(0.04)
    margin = 1.96 * math.sqrt((0.08 - 0.04**2) / 99)
    assert found.low == pytest.approx(0.04 - margin)
    assert found.high == pytest.approx(0.04 + margin)


def test_equal_models_have_no_interval() -> None:
    found = paired_difference([True, False], [True, False])
    assert (found.drop, found.low, found.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("reference", "candidate"), [([], []), ([True], [True, False])], ids=["empty", "unequal"])
def test_a_pair_needs_the_same_samples(reference: list[bool], candidate: list[bool]) -> None:
    with pytest.raises(ValueError, match="same samples"):
        paired_difference(reference, candidate)
