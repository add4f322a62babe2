"""CheXpert findings: F1 over 14 labels and over the five that are usually compared.

The answer must name findings by their label names, as the task's prompt asks. Reading findings out of a free report
takes a trained labeller (CheXbert), which this project does not have and does not imitate: run one, and put its labels
into the data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nvila.errors import DataError
from nvila.evaluation.scorers.contract import READ, Marks, Metric, Reference, Scorer

LABELS = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    "No Finding",
)
FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
_NAMES = re.compile("|".join(rf"(?<!\w){re.escape(label.lower())}(?!\w)" for label in LABELS))
_BY_NAME = {label.lower(): label for label in LABELS}


def read_labels(prediction: str) -> list[str]:
    """Return the label names that an answer lists, in the order of `LABELS`.

    Example:
        >>> read_labels("Edema, pleural effusion")
        ['Edema', 'Pleural Effusion']
    """
    named = {_BY_NAME[name] for name in _NAMES.findall(prediction.lower())}
    return [label for label in LABELS if label in named]


def chexpert(prediction: str, reference: Reference) -> Marks:
    """Score listed findings; `answer` is a list of label names, or label files' `{label: 1 | 0 | -1 | null}`.

    A finding that the label file calls uncertain (-1) counts as present.
    """
    return {READ: read_labels(prediction), "answer": _present(reference.get("answer"))}


def f1_over(labels: Sequence[str], *, macro: bool) -> Callable[[Sequence[Marks]], float]:
    """Return F1 over labels: of all decisions together (micro), or the mean over labels that occur (macro)."""

    def aggregate(marks: Sequence[Marks]) -> float:
        counts = [_count(marks, label) for label in labels]
        if not macro:
            counts = [tuple(map(sum, zip(*counts, strict=True)))]
        values = [2 * right / (said + true) for right, said, true in counts if said + true]
        return math.fsum(values) / len(values) if values else math.nan

    return aggregate


def _count(marks: Sequence[Marks], label: str) -> tuple[int, ...]:
    """Return how often a label was said rightly, was said, and was true."""
    said = [label in mark[READ] for mark in marks]
    true = [label in mark["answer"] for mark in marks]
    return sum(a and b for a, b in zip(said, true, strict=True)), sum(said), sum(true)


def _present(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        wrong = next((name for name in value if name not in LABELS), None)
        named = [name for name, state in value.items() if state in (1, -1)]
    elif isinstance(value, str | list | tuple):
        listed = value.split(",") if isinstance(value, str) else value
        names = [str(name).strip() for name in listed]
        wrong = next((name for name in names if name not in LABELS), None)
        named = names
    else:
        raise DataError("the answer holds no findings", "give a list of CheXpert labels, or {label: 1, 0, -1 or null}")
    if wrong is not None:
        raise DataError(f"{wrong!r} is no CheXpert label", f"use {', '.join(LABELS)}")
    return [label for label in LABELS if label in named]


CHEXPERT = Scorer(
    score=chexpert,
    metrics={
        "f1_micro_14": Metric(aggregate=f1_over(LABELS, macro=False)),
        "f1_macro_14": Metric(aggregate=f1_over(LABELS, macro=True)),
        "f1_micro_5": Metric(aggregate=f1_over(FIVE, macro=False)),
        "f1_macro_5": Metric(aggregate=f1_over(FIVE, macro=True)),
    },
)
