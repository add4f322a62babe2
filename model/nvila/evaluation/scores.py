"""Scores of short answers: exact match, blind baselines, and the paired difference of two models."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from nvila.data.records import Sample


def normalize_answer(text: str) -> str:
    """Bring an answer into the form that is compared: lower case, single spaces, no final period."""
    return " ".join(text.lower().split()).removesuffix(".").strip()


def exact_match(prediction: str, answer: str) -> bool:
    """Whether two answers are the same after `normalize_answer`."""
    return normalize_answer(prediction) == normalize_answer(answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Right answers out of all."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of right answers; 0 for none."""
        return self.correct / self.total if self.total else 0.0


def tally_by_source(samples: Sequence[Sample], correct: Sequence[bool]) -> dict[str, Tally]:
    """Count right answers of every source, sources in alphabetical order."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for sample, is_right in zip(samples, correct, strict=True):
        right[sample.source] += is_right
        total[sample.source] += 1
    return {source: Tally(correct=right[source], total=total[source]) for source in sorted(total)}


def blind_baselines(train: Sequence[Sample], test: Sequence[Sample]) -> tuple[list[bool], list[bool]]:
    """Answer a test set without looking at images.

    Args:
        train: Where the statistics come from.
        test: Samples to answer.

    Returns:
        Whether the most frequent answer of all is right for every test sample, and whether the most frequent answer
        to the same question text is (the most frequent of all where the text is new).
    """
    majority = Counter(sample.answer for sample in train).most_common(1)[0][0]
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in train:
        by_question[sample.question][sample.answer] += 1
    best = {question: answers.most_common(1)[0][0] for question, answers in by_question.items()}
    return (
        [sample.answer == majority for sample in test],
        [sample.answer == best.get(sample.question, majority) for sample in test],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """Accuracy that `candidate` loses against `reference` on the same samples, with a 95% interval.

    Args:
        drop: Accuracy of the reference minus that of the candidate; negative when the candidate is better.
        low: Lower end of the interval.
        high: Upper end.
        better: Samples that only the candidate answers.
        worse: Samples that only the reference answers.
    """

    drop: float
    low: float
    high: float
    better: int
    worse: int


def paired_difference(reference: Sequence[bool], candidate: Sequence[bool]) -> PairedDifference:
    """Compare two models on the same samples.

    The differences of single samples are -1, 0 or 1; the interval is the normal approximation of their mean, which
    is far tighter than comparing two accuracies with separate errors.

    Raises:
        ValueError: The sequences are empty or differ in length.
    """
    n = len(reference)
    if n == 0 or n != len(candidate):
        raise ValueError(f"a paired comparison needs the same samples, got {n} and {len(candidate)}")
    worse = sum(a and not b for a, b in zip(reference, candidate, strict=True))
    better = sum(b and not a for a, b in zip(reference, candidate, strict=True))
    drop = (worse - better) / n
    variance = ((worse + better) / n - drop**2) / max(1, n - 1)
    margin = 1.96 * math.sqrt(max(0.0, variance))
    return PairedDifference(drop=drop, low=drop - margin, high=drop + margin, better=better, worse=worse)
