"""OCRBench: the answer must contain one of the accepted texts."""

from __future__ import annotations

from nvila.evaluation.scorers.contract import READ, Marks, Reference, Scorer, answers_of, mean_metrics
from nvila.evaluation.scorers.text import full_width

# Handwritten formulas: spaces mean nothing there, case does.
FORMULAS = "HME100k"


def ocrbench(prediction: str, reference: Reference) -> Marks:
    """Score an answer by what it contains; `dataset` tells which part of the benchmark the sample is from."""
    form = _formula if reference.get("dataset") == FORMULAS else _line
    read = form(prediction)
    # The empty text is in every answer.
    wanted = [text for answer in answers_of(reference) if (text := form(answer))]
    return {READ: read, "accuracy": float(any(text in read for text in wanted))}


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _line(text: str) -> str:
    return full_width(text).lower().strip().replace("\n", " ")


OCRBENCH = Scorer(score=ocrbench, metrics=mean_metrics("accuracy"))
