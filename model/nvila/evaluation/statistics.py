"""How sure a score is: standard errors, intervals, and paired tests of two models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

LEVEL = 0.95
RESAMPLES = 1000
# Metrics over all samples are computed anew for each resample, in Python.
SLOW_RESAMPLES = 200
_EXACT_FLIPS = 14
_RANDOM_FLIPS = 9999

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its standard error and interval.

    Args:
        value: The number.
        stderr: Standard error; NaN when one sample cannot tell.
        low: Lower end of the interval; NaN when the samples cannot tell, as when resampling always gives one value.
        high: Upper end, likewise.
        method: How the interval was made: `wilson` or `bootstrap`.
    """

    value: float
    stderr: float
    low: float
    high: float
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """What a candidate scores above a reference on the same samples.

    Args:
        difference: Mean of candidate minus reference.
        low: Lower end of the interval of the difference.
        high: Upper end.
        p_value: Probability of a difference at least as large if the two were equal.
        test: `mcnemar-exact` for right and wrong, `permutation-exact` or `permutation` for other scores.
            For metrics that are no mean, samples of the two models are swapped at random: `swaps`.
        better: Samples on which the candidate scores higher.
        worse: Samples on which it scores lower.
    """

    difference: float
    low: float
    high: float
    p_value: float
    test: str
    better: int
    worse: int


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean, with the sample's own deviation; NaN for fewer than two values."""
    n = len(values)
    if n < 2:
        return math.nan
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def wilson(right: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's interval of a share; it stays between 0 and 1 and is honest for few samples.

    Example:
        >>> low, high = wilson(10, 10)
        >>> round(low, 4), high
        (0.7225, 1.0)
    """
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, z2 = right / n, z * z / n
    middle = share + z2 / 2
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n))
    # At 0 and 1 the end is exact; rounding must not move it.
    low = 0.0 if right == 0 else (middle - half) / (1 + z2)
    return low, 1.0 if right == n else (middle + half) / (1 + z2)


def estimate_mean(values: Sequence[float], *, seed: int, level: float = LEVEL) -> Estimate:
    """Return the mean of samples: Wilson's interval for right and wrong, else bootstrap percentiles.

    Raises:
        ValueError: There are no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("the mean of no values")
    mean = math.fsum(values) / n
    if all(value in (0, 1) for value in values):
        low, high = wilson(math.fsum(values), n, level)
        return Estimate(value=mean, stderr=standard_error(values), low=low, high=high, method="wilson")
    low, high = _mean_percentiles(values, seed, level) if len(set(values)) > 1 else (math.nan, math.nan)
    return Estimate(value=mean, stderr=standard_error(values), low=low, high=high, method="bootstrap")


def estimate_any(
    samples: Sequence[_T],
    aggregate: Callable[[Sequence[_T]], float],
    *,
    seed: int,
    level: float = LEVEL,
    resamples: int = SLOW_RESAMPLES,
) -> Estimate:
    """Return any number over samples, with error and interval from resampling them with replacement."""
    import numpy as np

    draw = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        value = aggregate([samples[place] for place in draw.integers(0, len(samples), len(samples))])
        if not math.isnan(value):
            found.append(value)
    if len(set(found)) < 2:
        return Estimate(value=aggregate(samples), stderr=math.nan, low=math.nan, high=math.nan, method="bootstrap")
    low, high = (float(end) for end in np.quantile(found, [(1 - level) / 2, (1 + level) / 2]))
    stderr = float(np.std(found, ddof=1))
    return Estimate(value=aggregate(samples), stderr=stderr, low=low, high=high, method="bootstrap")


def compare_paired(
    reference: Sequence[float], candidate: Sequence[float], *, seed: int, level: float = LEVEL
) -> Paired:
    """Compare two models on the same samples.

    Args:
        reference: Score of every sample under the reference.
        candidate: Score of the same samples, in the same order.
        seed: Of resampling and of random permutations.
        level: Of the interval.

    Raises:
        ValueError: There are no samples, or not as many of both.

    Example:
        >>> compare_paired([0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1], seed=0).p_value
        0.0625
    """
    if not reference or len(reference) != len(candidate):
        raise ValueError(f"a paired comparison needs the same samples, got {len(reference)} and {len(candidate)}")
    differences = [b - a for a, b in zip(reference, candidate, strict=True)]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    binary = all(value in (0, 1) for value in (*reference, *candidate))
    p_value, test = (mcnemar(better, worse), "mcnemar-exact") if binary else permutation(differences, seed=seed)
    low, high = _mean_percentiles(differences, seed, level)
    mean = math.fsum(differences) / len(differences)
    return Paired(difference=mean, low=low, high=high, p_value=p_value, test=test, better=better, worse=worse)


def compare_aggregates(
    pairs: Sequence[tuple[_T, _T]],
    aggregate: Callable[[Sequence[_T]], float],
    *,
    seed: int,
    level: float = LEVEL,
    resamples: int = SLOW_RESAMPLES,
) -> Paired:
    """Compare two models by any number over their samples, such as F1.

    The interval comes from resampling pairs. The test swaps the two models' samples of random pairs: were the models
    equal, that would change nothing.

    Args:
        pairs: What the number is made of, of the reference and of the candidate, sample by sample.
        aggregate: Makes the number; NaN when no sample counts.
        seed: Of resampling and swapping.
        level: Of the interval.
        resamples: Of each.

    Raises:
        ValueError: There are no pairs.
    """
    import numpy as np

    if not pairs:
        raise ValueError("a paired comparison of no samples")

    def difference(some: Sequence[tuple[_T, _T]]) -> float:
        return aggregate([b for _, b in some]) - aggregate([a for a, _ in some])

    observed, draw, n = difference(pairs), np.random.default_rng(seed), len(pairs)
    drawn = [difference([pairs[place] for place in draw.integers(0, n, n)]) for _ in range(resamples)]
    swapped = [
        difference([(b, a) if swap else (a, b) for (a, b), swap in zip(pairs, draw.random(n) < 0.5, strict=True)])
        for _ in range(resamples)
    ]
    known = [value for value in drawn if not math.isnan(value)] or [math.nan]
    low, high = (float(end) for end in np.quantile(known, [(1 - level) / 2, (1 + level) / 2]))
    extreme = sum(abs(value) >= abs(observed) - 1e-12 for value in swapped)
    p_value = (extreme + 1) / (resamples + 1)
    return Paired(difference=observed, low=low, high=high, p_value=p_value, test="swaps", better=0, worse=0)


def mcnemar(better: int, worse: int) -> float:
    """Return the exact two-sided p-value of a sign test on the samples that only one of two models gets right."""
    n, k = better + worse, min(better, worse)
    tail = term = 1
    for i in range(1, k + 1):
        term = term * (n - i + 1) // i
        tail += term
    return min(1.0, 2 * tail / (1 << n))  # whole numbers up to here, so it is exact for any n


def permutation(differences: Sequence[float], *, seed: int) -> tuple[float, str]:
    """Return the two-sided p-value of the mean difference under random signs, and how it was found.

    With few differences all signs are tried; else some at random, and the observed ones count as one of them.
    """
    import numpy as np

    moved = np.array([value for value in differences if value != 0.0])
    observed = abs(float(moved.sum())) - 1e-12 * (1 + float(np.abs(moved).sum()))
    if len(moved) <= _EXACT_FLIPS:
        signs = 1 - 2 * ((np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))) & 1)
        return float(np.mean(np.abs(signs @ moved) >= observed)), "permutation-exact"
    draw = np.random.default_rng(seed)
    extreme = 0
    for _ in range(_RANDOM_FLIPS):
        extreme += abs(float(moved @ draw.choice((-1.0, 1.0), len(moved)))) >= observed
    return (extreme + 1) / (_RANDOM_FLIPS + 1), "permutation"


def _mean_percentiles(values: Sequence[float], seed: int, level: float) -> tuple[float, float]:
    import numpy as np

    array, draw = np.asarray(values, dtype=float), np.random.default_rng(seed)
    means = [float(array[draw.integers(0, len(array), len(array))].mean()) for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
