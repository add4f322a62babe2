"""MMMU: multiple choice, and open questions by the rules of its authors."""

from __future__ import annotations

import re

from nvila.evaluation.scorers.choices import CHOICE_METRICS, multiple_choice
from nvila.evaluation.scorers.contract import READ, Marks, Reference, Scorer, answers_of
from nvila.evaluation.scorers.text import ascii_digits

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_NUMBER = re.compile(r"-?\d+(?:,\d{3})+(?:\.\d+)?|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|-?\.\d+")

Value = str | float


def mmmu(prediction: str, reference: Reference) -> Marks:
    """Score an answer: by letter where there are choices, else by what the answer says at its key places."""
    if reference.get("choices"):
        return multiple_choice(prediction, reference)
    read = open_values(prediction)
    wanted = [value for answer in answers_of(reference) for value in _values(answer)]
    right = any(_agrees(value, wanted) for value in read)
    return {READ: "; ".join(str(value) for value in read), "accuracy": float(right), "unread": float(not read)}


def open_values(prediction: str) -> list[Value]:
    """Return the texts and numbers that an open answer may mean.

    What follows the last "is", "so", "answer" and the like of each line, the shortest of these; in the last line also
    what follows "=". Without any of them, the whole answer. The authors' code means to split at sentences too, but puts
    all into lower case before it looks for the capital letter; published numbers are without it.
    """
    lines = ascii_digits(prediction).strip().strip(".").lower().split("\n")
    keys = []
    for number, line in enumerate(lines):
        marks = (*_INDICATORS, "=") if number == len(lines) - 1 else _INDICATORS
        tails = [line.rsplit(mark, 1)[1].strip() for mark in marks if mark in line]
        if tails and (shortest := min(tails, key=len)) not in _TRIVIAL:
            keys.append(shortest)
    keys = [key for key in keys or ["\n".join(lines)] if key]
    found: dict[Value, None] = {}
    for key in keys:
        for text in (key, *_NUMBER.findall(key)):
            found |= dict.fromkeys(_values(text))
    return list(found)


def _values(text: str) -> list[Value]:
    """A number is compared rounded to two places, a text in lower case, a single character as a word of its own."""
    text = ascii_digits(text).strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except (ValueError, OverflowError):
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text] if text else []


def _agrees(value: Value, wanted: list[Value]) -> bool:
    if isinstance(value, str):
        return any(isinstance(one, str) and one in value for one in wanted)
    return value in wanted


MMMU = Scorer(score=mmmu, metrics=CHOICE_METRICS, filter="flexible-extract")
