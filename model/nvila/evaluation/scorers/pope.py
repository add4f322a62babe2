"""POPE: does a model see objects that are not there?"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from nvila.errors import DataError
from nvila.evaluation.scorers.contract import READ, Marks, Metric, Reference, Scorer, answers_of, mean_metric
from nvila.evaluation.scorers.text import ascii_digits

_WORD = re.compile(r"[a-z]+")


def yes_or_no(text: str) -> str | None:
    """Return the first yes, no or not of a text.

    Example:
        >>> yes_or_no("There is not a dog.")
        'no'
    """
    for word in _WORD.findall(ascii_digits(text).lower()):
        if word in ("yes", "no"):
            return str(word)
        if word == "not":
            return "no"
    return None


def pope(prediction: str, reference: Reference) -> Marks:
    """Score a yes or no; what is neither is wrong, and missing from the denominator of precision alone.

    Raises:
        DataError: The reference is neither.
    """
    answer = answers_of(reference)[0].strip().lower()
    if answer not in ("yes", "no"):
        raise DataError(f"the answer {answer!r} is neither yes nor no", "POPE asks for one of them")
    read = yes_or_no(prediction)
    return {READ: read or "", "answer": answer, "accuracy": float(read == answer)}


def precision(marks: Sequence[Marks]) -> float:
    """Share of right ones among those answered yes."""
    return _share(marks, of="read")


def recall(marks: Sequence[Marks]) -> float:
    """Share of those that are yes which are answered yes."""
    return _share(marks, of="answer")


def f1(marks: Sequence[Marks]) -> float:
    """Harmonic mean of precision and recall; 0 without any right yes."""
    both = precision(marks), recall(marks)
    if any(math.isnan(value) for value in both) or sum(both) == 0:
        return 0.0
    return 2 * both[0] * both[1] / sum(both)


def yes_ratio(marks: Sequence[Marks]) -> float:
    """Share of yes among the answers; far from the truth's it shows a model that agrees with everything."""
    return sum(mark[READ] == "yes" for mark in marks) / len(marks) if marks else math.nan


def _share(marks: Sequence[Marks], *, of: str) -> float:
    counted = [mark for mark in marks if mark[of] == "yes"]
    right = sum(mark[READ] == mark["answer"] for mark in counted)
    return right / len(counted) if counted else math.nan


POPE = Scorer(
    score=pope,
    metrics={
        "accuracy": mean_metric("accuracy"),
        "precision": Metric(aggregate=precision),
        "recall": Metric(aggregate=recall),
        "f1": Metric(aggregate=f1),
        "yes_ratio": Metric(aggregate=yes_ratio, higher_is_better=None),
    },
)
