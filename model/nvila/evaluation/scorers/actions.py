"""Answers that are acted on: the next action of a robot, and the call of an expert."""

from __future__ import annotations

from nvila.applications.experts import parse_trigger
from nvila.applications.navigation import parse_action
from nvila.errors import DataError
from nvila.evaluation.scorers.contract import READ, Marks, Reference, Scorer, answers_of, mean_metrics
from nvila.evaluation.scorers.text import plain


def navigation_action(prediction: str, reference: Reference) -> Marks:
    """Score a sentence by the discrete action that it becomes.

    Raises:
        DataError: The reference names no action.

    Example:
        >>> navigation_action("turn left 14 degrees", {"answer": "turn left 15 degrees"})["action"]
        1.0
    """
    wanted, read = parse_action(answers_of(reference)[0]), parse_action(prediction)
    if wanted is None:
        raise DataError(f"the answer {answers_of(reference)[0]!r} names no action", "say turn, move forward or stop")
    return {
        READ: prediction if read is None else f"{read.kind} {read.times}",
        "action": float(read == wanted),
        "direction": float(read is not None and read.kind == wanted.kind),
    }


def expert_trigger(prediction: str, reference: Reference) -> Marks:
    """Score a call of an expert by name and arguments, and any other answer by exact match."""
    answer = answers_of(reference)[0]
    wanted, read = parse_trigger(answer), parse_trigger(prediction)
    if wanted is None:
        right = float(plain(prediction) == plain(answer))
        return {READ: plain(prediction), "accuracy": right, "answers": right}
    return {READ: prediction, "accuracy": float(read == wanted), "triggers": float(read == wanted)}


NAVIGATION_ACTION = Scorer(score=navigation_action, metrics=mean_metrics("action", "direction"))
EXPERT_TRIGGER = Scorer(score=expert_trigger, metrics=mean_metrics("accuracy", "triggers", "answers"))
