"""VQA accuracy with the official normalisation of answers: VQAv2 and TextVQA.

Ten people answered each question. An answer is worth min(1, matches / 3) against nine of them, averaged over the ten
ways to leave one out. The normalisation follows the evaluation code of VQA to the letter, oddities included, because
published numbers contain them.
"""

from __future__ import annotations

import math
import re
from functools import partial

from nvila.evaluation.scorers.contract import READ, Marks, Reference, Scorer, answers_of, mean_metrics

_COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(count) for count, word in enumerate(_COUNTS)}
_ARTICLES = frozenset(("a", "an", "the"))
_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,+\d")
# The official pattern means to spare decimal points; its look-behind is misspelled and spares only the look-ahead.
_PERIOD = re.compile(r"\.(?!\d)")
# The official call passes a flag where the number of replacements belongs.
_MOST_PERIODS = 32

# Words that people write without their apostrophe, or without one of two.
_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_TWO_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in _TWO_APOSTROPHES.split():
        first, middle, last = word.split("'")
        table |= {f"{first}{middle}'{last}": word, f"{first}'{middle}{last}": word}
    # Irregular ones; the second is the other way round in the official table.
    table |= {"ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at", "somebody'd": "somebodyd"}
    return table | dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")


CONTRACTIONS = _contractions()


def normalize(text: str, *, as_words: bool = False) -> str:
    """Bring an answer into the form that is compared.

    Args:
        text: The answer.
        as_words: Drop commas and question marks and cut off `'s` first, as TextVQA does.

    Example:
        >>> normalize("The two dogs, dont run!")
        "2 dogs don't run"
    """
    if as_words:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _words(_punctuation(text))


def vqa_accuracy(prediction: str, reference: Reference, *, as_words: bool = False) -> Marks:
    """Score an answer against those that people gave; a single one must match."""
    read = normalize(prediction, as_words=as_words)
    given = [normalize(answer, as_words=as_words) for answer in answers_of(reference)]
    if len(given) == 1:
        return {READ: read, "exact_match": float(read == given[0])}
    same = given.count(read)
    # An answer that matches is one match less when it is the one left out.
    out = (min(1.0, (same - (answer == read)) / 3) for answer in given)
    return {READ: read, "exact_match": math.fsum(out) / len(given)}


def _punctuation(text: str) -> str:
    glued = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for sign in _SIGNS:
        alone = f"{sign} " in text or f" {sign}" in text
        out = out.replace(sign, "" if alone or glued else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


VQA = Scorer(score=vqa_accuracy, metrics=mean_metrics("exact_match"))
TEXT_VQA = Scorer(score=partial(vqa_accuracy, as_words=True), metrics=mean_metrics("exact_match"))
