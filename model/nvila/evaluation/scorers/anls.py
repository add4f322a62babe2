"""Average normalised Levenshtein similarity: DocVQA and InfographicVQA."""

from __future__ import annotations

from nvila.evaluation.scorers.contract import READ, Marks, Reference, Scorer, answers_of, mean_metrics
from nvila.evaluation.scorers.text import squash

THRESHOLD = 0.5


def levenshtein(a: str, b: str) -> int:
    """Return how many insertions, deletions and replacements of a character turn `a` into `b`.

    Example:
        >>> levenshtein("kitten", "sitting")
        3
    """
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, char in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (char != other))
    return row[-1]


def similarity(prediction: str, answer: str) -> float:
    """Return 1 - distance / longer length, or 0 where that is below the threshold.

    Case and runs of spaces do not count. Exactly at the threshold the similarity stays, as in the official script.
    """
    a, b = squash(prediction), squash(answer)
    longest, shortest = max(len(a), len(b)), min(len(a), len(b))
    if longest == 0:
        return 1.0
    if shortest / longest < THRESHOLD:  # the distance is at least the difference in length
        return 0.0
    value = 1 - levenshtein(a, b) / longest
    return value if value >= THRESHOLD else 0.0


def anls(prediction: str, reference: Reference) -> Marks:
    """Score an answer by the most similar of the accepted ones.

    Example:
        >>> anls("Janury 5", {"answer": ["January 5", "5 Jan"]})["anls"]
        0.8888888888888888
    """
    values = [similarity(prediction, answer) for answer in answers_of(reference)]
    return {READ: squash(prediction), "anls": max(values)}


ANLS = Scorer(score=anls, metrics=mean_metrics("anls"))
