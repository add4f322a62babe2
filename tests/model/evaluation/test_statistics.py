"""Errors, intervals and tests against values from tables and from closed forms."""

from __future__ import annotations

import math
import random

import pytest

from nvila.evaluation.statistics import (
    compare_paired,
    estimate_any,
    estimate_mean,
    mcnemar,
    permutation,
    standard_error,
    wilson,
)


def test_standard_error() -> None:
    # mean 2, squared deviations 1 + 0 + 1, / 2 / 3
    assert standard_error([1, 2, 3]) == pytest.approx(math.sqrt(1 / 3))
    assert math.isnan(standard_error([1]))


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (5, 10, 0.2366, 0.7634),  # Newcombe 1998 and statsmodels give these
        (81, 263, 0.2553, 0.3662),
        (0, 20, 0.0, 0.1611),
        (10, 10, 0.7225, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(right: int, n: int, low: float, high: float) -> None:
    assert list(wilson(right, n)) == pytest.approx([low, high], abs=5e-5)


def test_means_of_right_and_wrong_take_wilson() -> None:
    estimate = estimate_mean([1.0] * 5 + [0.0] * 5, seed=0)
    assert (estimate.value, estimate.method) == (0.5, "wilson")
    assert (estimate.low, estimate.high) == wilson(5, 10)
    with pytest.raises(ValueError, match="no values"):
        estimate_mean([], seed=0)


def test_means_of_other_scores_take_the_bootstrap() -> None:
    noise = random.Random(0)
    values = [noise.gauss(3, 2) for _ in range(400)]
    estimate = estimate_mean(values, seed=1)
    assert estimate.method == "bootstrap"
    # 1.96 standard errors to either side, as the normal approximation has it for 400 values
    assert estimate.low == pytest.approx(estimate.value - 1.96 * estimate.stderr, abs=0.03)
    assert estimate.high == pytest.approx(estimate.value + 1.96 * estimate.stderr, abs=0.03)
    assert estimate_mean(values, seed=1) == estimate


def test_a_constant_cannot_tell_an_interval() -> None:
    estimate = estimate_mean([0.5, 0.5], seed=0)
    assert math.isnan(estimate.low)
    estimate = estimate_any([2.0, 2.0], lambda found: found[0], seed=0)
    assert estimate.value == 2
    assert math.isnan(estimate.high)
    assert math.isnan(estimate_any([1.0], lambda found: math.nan, seed=0).stderr)


def test_any_metric_is_resampled() -> None:
    noise = random.Random(0)
    values = [noise.random() for _ in range(300)]
    estimate = estimate_any(values, lambda found: sum(found) / len(found), seed=0, resamples=400)
    assert estimate.stderr == pytest.approx(standard_error(values), rel=0.15)
    assert estimate.low < estimate.value < estimate.high


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1.0),
        (5, 0, 2 / 32),
        (1, 5, 2 * (1 + 6) / 64),
        (3, 3, 1.0),  # the two tails overlap
        (6, 2, 2 * (1 + 8 + 28) / 256),
    ],
)
def test_mcnemar(better: int, worse: int, p: float) -> None:
    assert mcnemar(better, worse) == mcnemar(worse, better) == pytest.approx(p)


def test_mcnemar_of_many() -> None:
    # Normal approximation with continuity correction: z = (200 - 1) / sqrt(4000)
    z = 199 / math.sqrt(4000)
    assert mcnemar(2100, 1900) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_permutation() -> None:
    # All 8 signs of (1, 2, 3): sums +-6, +-4, +-2, 0, 0; two of eight reach 6.
    assert permutation([1.0, 2.0, 0.0, 3.0], seed=0) == (0.25, "permutation-exact")
    assert permutation([0.0], seed=0) == (1.0, "permutation-exact")
    p, test = permutation([0.1] * 20 + [-0.1] * 2, seed=0)
    assert test == "permutation"
    assert p < 0.01
    assert permutation([0.1, -0.1] * 10, seed=0)[0] == 1.0


def test_paired_comparison() -> None:
    reference, candidate = [1, 0, 0, 0, 1, 0, 0, 1], [1, 1, 1, 0, 0, 1, 1, 1]
    paired = compare_paired(reference, candidate, seed=0)
    assert (paired.better, paired.worse, paired.test) == (4, 1, "mcnemar-exact")
    assert paired.difference == pytest.approx(3 / 8)
    assert paired.p_value == pytest.approx(2 * (1 + 5) / 32)
    assert paired.low < paired.difference < paired.high
    assert compare_paired([0.2, 0.4], [0.3, 0.4], seed=0).test == "permutation-exact"
    for a, b in (([], []), ([1], [1, 0])):
        with pytest.raises(ValueError, match="same samples"):
            compare_paired(a, b, seed=0)
