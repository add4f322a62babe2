"""Overlap of a text with references: BLEU-4 of the corpus, and ROUGE-L."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from nvila.evaluation.scorers.contract import READ, Marks, Metric, Reference, Scorer, answers_of, mean_metric
from nvila.evaluation.scorers.text import squash

ORDERS = (1, 2, 3, 4)
# Recall counts more than precision, as in the evaluation code of COCO captions.
BETA = 1.2
_TOKEN = re.compile(r"\w+(?:'\w+)?|[^\w\s]")


def tokens(text: str) -> list[str]:
    """Split into words and signs, in lower case.

    Example:
        >>> tokens("No acute disease.")
        ['no', 'acute', 'disease', '.']
    """
    return _TOKEN.findall(text.lower())


def report(prediction: str, reference: Reference) -> Marks:
    """Count what BLEU needs of a text, and score ROUGE-L against the best reference."""
    said = tokens(prediction)
    references = [tokens(answer) for answer in answers_of(reference)]
    nearest = min((len(one) for one in references), key=lambda length: (abs(length - len(said)), length))
    return {
        READ: squash(prediction),
        "matches": [_matches(said, references, n) for n in ORDERS],
        "totals": [max(0, len(said) - n + 1) for n in ORDERS],
        "length": len(said),
        "reference_length": nearest,
        "rouge_l": max(rouge_l(said, one) for one in references),
    }


def bleu_4(marks: Sequence[Marks]) -> float:
    """Return BLEU-4 of a corpus: clipped n-gram precisions, geometric mean, brevity penalty; no smoothing."""
    if not marks:
        return math.nan
    logs = []
    for place in range(len(ORDERS)):
        matches = sum(mark["matches"][place] for mark in marks)
        if matches == 0:
            return 0.0
        logs.append(math.log(matches / sum(mark["totals"][place] for mark in marks)))
    length, wanted = (sum(mark[name] for mark in marks) for name in ("length", "reference_length"))
    return math.exp(math.fsum(logs) / len(ORDERS) + min(0.0, 1 - wanted / length))


def rouge_l(said: Sequence[str], reference: Sequence[str], beta: float = BETA) -> float:
    """Return the F measure of the longest common subsequence."""
    common = _common(said, reference)
    if common == 0:
        return float(not said and not reference)
    precision, recall = common / len(said), common / len(reference)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for token in a:
        before = 0
        for j, other in enumerate(b, start=1):
            before, row[j] = row[j], before + 1 if token == other else max(row[j], row[j - 1])
    return row[-1]


def _matches(said: Sequence[str], references: Sequence[Sequence[str]], n: int) -> int:
    """Return how many n-grams occur in a reference; each at most as often as there."""
    most: Counter[tuple[str, ...]] = Counter()
    for one in references:
        most |= _grams(one, n)
    return (_grams(said, n) & most).total()


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


REPORT = Scorer(score=report, metrics={"bleu_4": Metric(aggregate=bleu_4), "rouge_l": mean_metric("rouge_l")})
