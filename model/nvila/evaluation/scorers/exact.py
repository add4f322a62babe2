"""Exact match: GQA, and the built-in tasks."""

from __future__ import annotations

from nvila.evaluation.scorers.contract import READ, Marks, Reference, Scorer, answers_of, mean_metrics
from nvila.evaluation.scorers.text import plain


def exact(prediction: str, reference: Reference) -> Marks:
    """Compare without case and punctuation; any accepted answer will do.

    Example:
        >>> exact("Red.", {"answer": "red"})
        {'read': 'red', 'exact_match': 1.0}
    """
    read = plain(prediction)
    return {READ: read, "exact_match": float(any(read == plain(answer) for answer in answers_of(reference)))}


EXACT = Scorer(score=exact, metrics=mean_metrics("exact_match"))
