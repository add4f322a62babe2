"""Which answers a model takes for which, as the matrix that the Kubeflow UI draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

OTHER = "(other)"
# More lines cannot be read.
_MOST = 20


def confusion_matrix(lines: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[list[int]]]:
    """Count what was predicted for each right answer.

    Args:
        lines: Predictions of an evaluation.

    Returns:
        The answers, the most frequent first and `OTHER` last, and a row for each right answer with a count for each
        predicted one. Rare answers, and predictions that are no answer, are `OTHER`.

    Example:
        >>> right = {"answer": "red", "prediction": "Red.", "correct": True}
        >>> wrong = {"answer": "blue", "prediction": "red", "correct": False}
        >>> confusion_matrix([right, right, wrong])
        (['red', 'blue', '(other)'], [[2, 0, 0], [1, 0, 0], [0, 0, 0]])
    """
    # What counts as right decides how answers are compared, so a right one is never compared again.
    pairs = [(_plain(one["answer"]), _plain(one["answer" if one["correct"] else "prediction"])) for one in lines]
    frequent = Counter(answer for answer, _ in pairs).most_common(_MOST)
    categories = [*(answer for answer, _ in frequent), OTHER]
    index = {category: number for number, category in enumerate(categories)}
    matrix = [[0] * len(categories) for _ in categories]
    last = index[OTHER]
    for answer, prediction in pairs:
        matrix[index.get(answer, last)][index.get(prediction, last)] += 1
    return categories, matrix


def _plain(text: object) -> str:
    return str(text).strip().lower()
