"""DeltaLoss selection: the paper's rule, its ties, and the two corrections for weak scorers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvila.curation.selection import centre, round_to, select_top
from nvila.errors import ConfigError


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(0.0, []), (0.2, [3]), (0.21, [1, 3]), (0.6, [1, 3, 4]), (1.0, [0, 1, 2, 3, 4])],
    ids=["none", "exact", "rounded-up", "three", "all"],
)
def test_the_top_share_is_kept_rounded_up(rate: float, expected: list[int]) -> None:
    kept = select_top([0.1, 0.8, -1.0, 0.9, 0.5], ["a"] * 5, rate)
    assert [index for index, keep in enumerate(kept) if keep] == expected


def test_selection_is_per_source_not_global() -> None:
    kept = select_top([9.0, 8.0, 0.2, 0.1], ["rich", "rich", "poor", "poor"], 0.5)
    assert kept == [True, False, True, False]


def test_sources_may_have_rates_of_their_own() -> None:
    assert select_top([1.0, 2.0, 3.0, 4.0], ["a", "a", "b", "b"], {"a": 1.0, "b": 0.5}) == [True, True, False, True]


def test_ties_go_to_the_earlier_sample() -> None:
    assert select_top([1.0, 1.0, 1.0, 1.0], ["a"] * 4, 0.5) == [True, True, False, False]


def test_a_product_that_is_whole_but_for_rounding_is_not_rounded_up() -> None:
    assert sum(select_top([0.0] * 30, ["a"] * 30, 0.1)) == 3


@pytest.mark.parametrize(
    ("deltas", "rates", "message"),
    [
        ([1.0], 1.5, "outside 0..1"),
        ([1.0], {"b": 0.5}, "no keep rate for source 'a'"),
        ([math.nan], 0.5, "NaN"),
    ],
    ids=["rate", "missing-rate", "nan"],
)
def test_bad_selections_are_refused(deltas: list[float], rates: float | dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_top(deltas, ["a"], rates)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=60), st.floats(0, 1))
def test_no_ignored_sample_beats_a_kept_one(deltas: list[float], rate: float) -> None:
    kept = select_top(deltas, ["a"] * len(deltas), rate)
    assert sum(kept) == math.ceil(round(rate * len(deltas), 9))
    inside = [delta for delta, keep in zip(deltas, kept, strict=True) if keep]
    outside = [delta for delta, keep in zip(deltas, kept, strict=True) if not keep]
    assert not inside or not outside or min(inside) >= max(outside)


def test_centred_scores_keep_the_answers_balanced() -> None:
    # A blind pair of scorers: delta depends on the answer alone, so the literal rule keeps one answer only.
    answers = ["yes", "no"] * 4
    deltas = [1.0 if answer == "yes" else -1.0 for answer in answers]
    literal = select_top(deltas, ["a"] * 8, 0.5)
    assert {answer for answer, keep in zip(answers, literal, strict=True) if keep} == {"yes"}
    centred = select_top(centre(deltas, answers), ["a"] * 8, 0.5)
    kept = [answer for answer, keep in zip(answers, centred, strict=True) if keep]
    assert sorted(kept) == ["no", "no", "yes", "yes"]


def test_centring_subtracts_the_mean_of_the_group() -> None:
    assert centre([1.0, 3.0, 10.0], ["a", "a", "b"]) == [-1.0, 1.0, 0.0]


def test_differences_below_the_resolution_are_ties() -> None:
    assert round_to([0.2, -0.3, 0.9, 1.2], 1.0) == [0.0, 0.0, 1.0, 1.0]
    assert round_to([0.2, -0.3], 0) == [0.2, -0.3]
