"""Relaxed accuracy of ChartQA: numbers may be five percent off, texts must match."""

from __future__ import annotations

from nvila.evaluation.scorers.contract import READ, Marks, Reference, Scorer, answers_of, mean_metrics
from nvila.evaluation.scorers.text import number

TOLERANCE = 0.05


def relaxed_match(prediction: str, answer: str, tolerance: float = TOLERANCE) -> bool:
    """Tell whether a number is within `tolerance` of the answer, relative to it, or a text the same without case.

    `12%` is the number 0.12. No relative error to the answer 0 exists: only 0 is right there.

    Example:
        >>> relaxed_match("10.4", "10"), relaxed_match("10.6", "10"), relaxed_match("12%", "0.12")
        (True, False, True)
    """
    prediction, answer = prediction.strip(), answer.strip()
    read, wanted = _number(prediction), _number(answer)
    if read is None or wanted is None:
        return prediction.lower() == answer.lower()
    if wanted == 0:
        return read == 0
    return abs(read - wanted) / abs(wanted) <= tolerance


def relaxed_accuracy(prediction: str, reference: Reference) -> Marks:
    """Score an answer of ChartQA; questions of the human half and of the augmented half are told apart."""
    right = float(any(relaxed_match(prediction, answer) for answer in answers_of(reference)))
    half = "human" if str(reference.get("category", "")).startswith("human") else "augmented"
    marks: Marks = {READ: prediction.strip(), "relaxed_overall": right}
    return marks | ({f"relaxed_{half}_split": right} if "category" in reference else {})


def _number(text: str) -> float | None:
    if text.endswith("%"):
        value = number(text.rstrip("%"))
        return None if value is None else value / 100
    return number(text)


RELAXED = Scorer(
    score=relaxed_accuracy,
    metrics=mean_metrics("relaxed_overall", "relaxed_human_split", "relaxed_augmented_split"),
)
