"""MathVista without a judge: the answer is read by rules, then compared as the authors compare.

The published protocol has a language model read the answer out of free text. Rules read what prompts ask for, so a
model that explains itself at length scores lower here than there.
"""

from __future__ import annotations

import math
import re

from nvila.evaluation.scorers.anls import levenshtein
from nvila.evaluation.scorers.choices import CHOICE_METRICS, LETTERS, choices_of, read_choice
from nvila.evaluation.scorers.contract import READ, Marks, Reference, Scorer, answers_of
from nvila.evaluation.scorers.text import ascii_digits, number

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_LIST = re.compile(r"\[[^\[\]]*\]")
_LONGEST_CHOICE = 100


def mathvista(prediction: str, reference: Reference) -> Marks:
    """Score an answer of the kind that the reference says.

    `question_type` is `multi_choice` or `free_form`; `answer_type` is `text`, `integer`, `float` or `list`, and
    `precision` the number of decimals of a float.
    """
    prediction = ascii_digits(prediction).strip()
    if reference.get("question_type") == "multi_choice" or reference.get("choices"):
        read = _choice(prediction, choices_of(reference))
    else:
        read = read_value(prediction, str(reference.get("answer_type", "text")), reference.get("precision"))
    right = read is not None and any(read == answer.strip() for answer in answers_of(reference))
    return {READ: read or "", "accuracy": float(right), "unread": float(read is None)}


def read_value(text: str, kind: str, precision: object = None) -> str | None:
    """Read a value in the spelling that the data set uses.

    Example:
        >>> read_value("The area is 12.346 cm.", "float", 2)
        '12.35'
    """
    if kind == "list":
        found = _LIST.findall(text)
        return str(found[-1]) if found else None
    if kind == "text":
        return text.removesuffix(".") or None
    numbers = [value for found in _NUMBER.findall(text) if (value := number(found.replace(",", ""))) is not None]
    if not numbers:
        return None
    if kind == "integer":
        return str(int(numbers[-1]))
    places = precision if isinstance(precision, int | float) and math.isfinite(precision) else 0
    return str(round(numbers[-1], int(places)))


def _choice(text: str, choices: list[str]) -> str | None:
    """Return the choice that is meant; the most similar one where no rule tells, as the authors do."""
    letter = read_choice(text, choices)
    if letter is not None:
        return choices[LETTERS.index(letter)].strip()
    short = text[:_LONGEST_CHOICE]
    return min(choices, key=lambda choice: levenshtein(short, choice)).strip() if text else None


MATHVISTA = Scorer(score=mathvista, metrics=CHOICE_METRICS, filter="flexible-extract")
