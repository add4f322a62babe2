"""ActivityNet-QA: short open answers about videos, scored without a judge model.

Published numbers of chat models come from a GPT judge. `exact_match` is the accuracy of the data set's own paper;
`contains` also accepts the answer's words inside a sentence, which is nearer to what a judge accepts.
"""

from __future__ import annotations

from nvila.evaluation.scorers.contract import READ, Marks, Reference, Scorer, answers_of, mean_metrics
from nvila.evaluation.scorers.pope import yes_or_no
from nvila.evaluation.scorers.vqa import normalize


def open_video(prediction: str, reference: Reference) -> Marks:
    """Score an answer after the normalisation of VQA; for yes and no the first of the two words counts.

    Example:
        >>> open_video("They are playing the violin.", {"answer": "violin"})
        {'read': 'they are playing violin', 'exact_match': 0.0, 'contains': 1.0}
    """
    read = normalize(prediction)
    exact = contained = False
    for answer in map(normalize, answers_of(reference)):
        exact |= read == answer
        in_words = bool(answer) and f" {answer} " in f" {read} "
        contained |= yes_or_no(read) == answer if answer in ("yes", "no") else in_words
    return {READ: read, "exact_match": float(exact), "contains": float(exact or contained)}


OPEN_VIDEO = Scorer(score=open_video, metrics=mean_metrics("exact_match", "contains"))
