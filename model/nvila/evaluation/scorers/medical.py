"""Medical visual questions (VQA-RAD, PathVQA): closed ones by accuracy, open ones by recall of the answer's words."""

from __future__ import annotations

from nvila.evaluation.scorers.contract import READ, Marks, Reference, Scorer, answers_of, mean_metrics
from nvila.evaluation.scorers.pope import yes_or_no
from nvila.evaluation.scorers.text import plain


def medical_vqa(prediction: str, reference: Reference) -> Marks:
    """Score an answer; a question is closed where its answer is yes or no, or `category` says so.

    `accuracy` holds both kinds: closed ones by yes and no, open ones by exact match.

    Example:
        >>> medical_vqa("the left lung", {"answer": "left upper lung"})["open_recall"]
        0.6666666666666666
    """
    answers = [plain(answer) for answer in answers_of(reference)]
    read = plain(prediction)
    if all(answer in ("yes", "no") for answer in answers):
        said = yes_or_no(prediction)
        right = float(said in answers)
        return {READ: said or "", "accuracy": right, "closed_accuracy": right}
    exact = float(read in answers)
    if str(reference.get("category", "")).strip().lower() == "closed":
        return {READ: read, "accuracy": exact, "closed_accuracy": exact}
    recall = max(_recall(read, answer) for answer in answers)
    return {READ: read, "accuracy": exact, "open_exact": exact, "open_recall": recall}


def _recall(read: str, answer: str) -> float:
    words = set(answer.split())
    return len(words & set(read.split())) / len(words) if words else float(not read)


MEDICAL_VQA = Scorer(
    score=medical_vqa, metrics=mean_metrics("accuracy", "closed_accuracy", "open_exact", "open_recall")
)
