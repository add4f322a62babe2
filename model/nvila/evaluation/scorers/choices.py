"""Multiple choice: which letter an answer means.

What cannot be read is no guess: it counts as wrong, and `unread` says how many there were.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from nvila.errors import DataError
from nvila.evaluation.scorers.contract import READ, Marks, Metric, Reference, Scorer, answers_of, mean_metric
from nvila.evaluation.scorers.text import full_width, plain, squash

LETTERS = string.ascii_uppercase
# Letters of a question that does not list its choices apart from its text.
_USUAL = 5

_QUOTES = "\"'`*_ \t\r\n"
_ALONE = re.compile(r"^[(\[]?([A-Za-z])[)\].:,;!]*$")
_LEADING = re.compile(r"^(?:[(\[]([A-Z])[)\]]|([A-Z])[.:)\]](?=\s|$))")
_STATED = re.compile(
    r"\b(?i:answer|option|choice|choose|select|pick)\b(?:\s+(?i:is|would be|should be|option|choice|letter))*"
    r"\s*[:=]?\s*[\"'`*_]*(?:[(\[]([A-Za-z])[)\]]|([A-Z])(?![A-Za-z']))"
)
_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")
_WORD = re.compile(r"(?<![A-Za-z'-])([A-Z])(?![A-Za-z'-])")
_ARTICLE = re.compile(r"\s+[a-z]")
_LISTED = re.compile(r"(?m)^\s*[(\[]?([A-Z])[.):\]]\s+(\S.*?)\s*$")


def choices_of(reference: Reference) -> list[str]:
    """Return the texts of the choices; those that stand in the question when the data does not list them apart."""
    value = reference.get("choices")
    if value is not None:
        if not isinstance(value, list | tuple) or not value:
            raise DataError("field 'choices' is no list of texts", "map it to a list, or to one column a choice")
        return [str(choice) for choice in value]
    listed = _LISTED.findall(str(reference.get("question", "")))
    in_order = [text for number, (letter, text) in enumerate(listed) if letter == LETTERS[number % len(LETTERS)]]
    return in_order if len(in_order) == len(listed) else []


def read_choice(prediction: str, choices: Sequence[str]) -> str | None:
    """Return the letter that an answer means, or None.

    In this order: the answer is a letter, begins with one, states one ("the answer is B"), is the text of a choice,
    has one in brackets, has a capital letter as a word, mentions the text of exactly one choice. Of several the last
    counts, since models think aloud first.

    Args:
        prediction: The answer.
        choices: Texts of the choices; empty when only their letters are known, then A to E are read.

    Example:
        >>> read_choice("I think the answer is (b).", ["a cat", "a dog"])
        'B'
        >>> read_choice("A dog", ["a cat", "a dog"])
        'B'
    """
    letters = LETTERS[: len(choices) or _USUAL]
    text = full_width(prediction).strip(_QUOTES)
    if match := _ALONE.match(text):
        return _known(match[1], letters)
    if (match := _LEADING.match(text)) and (found := _known(match[1] or match[2], letters)):
        return found
    if found := _last(_STATED, text, letters):
        return found
    by_text = {plain(choice): letter for letter, choice in zip(letters, choices, strict=False) if plain(choice)}
    if found := by_text.get(plain(text)):
        return found
    return _last(_BRACKETED, text, letters) or _last(_WORD, text, letters) or _mentioned(text, by_text)


def multiple_choice(prediction: str, reference: Reference) -> Marks:
    """Score a chosen letter. The reference's answer is a letter, or the text of a choice."""
    choices = choices_of(reference)
    read = read_choice(prediction, choices)
    wanted = {_letter(answer, choices) for answer in answers_of(reference)}
    return {READ: read or "", "accuracy": float(read in wanted), "unread": float(read is None)}


def choice_or_text(prediction: str, reference: Reference) -> Marks:
    """Score a letter where the answer is one, else a text without case and punctuation: RealWorldQA."""
    answers = answers_of(reference)
    if all(len(answer.strip()) == 1 and answer.strip().upper() in LETTERS for answer in answers):
        return multiple_choice(prediction, reference)
    read = plain(prediction)
    return {READ: read, "accuracy": float(any(read == plain(answer) for answer in answers)), "unread": 0.0}


def _letter(answer: str, choices: Sequence[str]) -> str:
    answer = answer.strip()
    if len(answer) == 1 and answer.upper() in LETTERS[: len(choices) or len(LETTERS)]:
        return answer.upper()
    same = [letter for letter, choice in zip(LETTERS, choices, strict=False) if squash(choice) == squash(answer)]
    if not same:
        raise DataError(
            f"the answer {answer!r} is none of the {len(choices)} choices", "give a letter or a choice's text"
        )
    return same[0]


def _known(letter: str, letters: str) -> str | None:
    return letter.upper() if letter.upper() in letters else None


def _last(pattern: re.Pattern[str], text: str, letters: str) -> str | None:
    found = None
    for match in pattern.finditer(text):
        letter = next(group for group in match.groups() if group)
        # "A" before a small letter is an article, "I" is the writer.
        is_word = pattern is _WORD and (letter == "I" or (letter == "A" and _ARTICLE.match(text, match.end())))
        found = found if is_word else _known(letter, letters) or found
    return found


def _mentioned(text: str, by_text: Mapping[str, str]) -> str | None:
    padded = f" {plain(text)} "
    found = [(choice, letter) for choice, letter in by_text.items() if f" {choice} " in padded]
    # "red" is also mentioned where "dark red" is.
    longest = [letter for choice, letter in found if not any(choice != other and choice in other for other, _ in found)]
    return longest[0] if len(longest) == 1 else None


CHOICE_METRICS: dict[str, Metric] = {
    "accuracy": mean_metric("accuracy"),
    "unread": mean_metric("unread", higher_is_better=False),
}
CHOICE = Scorer(score=multiple_choice, metrics=CHOICE_METRICS, filter="flexible-extract")
CHOICE_OR_TEXT = Scorer(score=choice_or_text, metrics=CHOICE_METRICS, filter="flexible-extract")
