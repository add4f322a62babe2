"""Temporal localisation: how well an answered span of a video overlaps the true one (ActivityNet-RTL)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from nvila.errors import DataError
from nvila.evaluation.scorers.contract import READ, Marks, Metric, Reference, Scorer

NUM_TIME_TOKENS = 100
_TIME_TOKEN = re.compile(r"<t(\d+)>")
_SECONDS = re.compile(r"<(\d+(?:\.\d+)?)>")


def read_span(prediction: str, duration: float, num_time_tokens: int = NUM_TIME_TOKENS) -> tuple[float, float]:
    """Return the span that an answer names by its first two moments, in seconds.

    Moments are time tokens `<t12>` or seconds `<12.5>`. With fewer than two the span is the whole video.

    Example:
        >>> read_span("from <t25> to <9.5>", duration=99)
        (9.5, 25.0)
    """

    def seconds(match: re.Match[str]) -> str:
        token = int(match[1])
        value = duration if token >= num_time_tokens else round(token * duration / (num_time_tokens - 1), 2)
        return f"<{value:.2f}>"

    found = [float(text) for text in _SECONDS.findall(_TIME_TOKEN.sub(seconds, prediction))[:2]]
    if len(found) < 2:
        return 0.0, duration
    start, end = sorted(min(max(value, 0.0), duration) for value in found)
    return start, end


def overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Return intersection over union of two spans; 0 where the union is empty."""
    union = max(a[1], b[1]) - min(a[0], b[0])
    both = min(a[1], b[1]) - max(a[0], b[0])
    # Apart, the gap between them is no part of the union.
    union = union if both >= 0 else (a[1] - a[0]) + (b[1] - b[0])
    return max(0.0, both) / union if union > 0 else 0.0


def temporal(prediction: str, reference: Reference) -> Marks:
    """Score a span; `answer` is [start, end] and `duration` the video's length, in seconds.

    Raises:
        DataError: The reference is no span or has no duration.
    """
    duration, wanted = _positive(reference.get("duration")), reference.get("answer")
    if not isinstance(wanted, list | tuple) or len(wanted) != 2 or not all(_is_number(value) for value in wanted):
        raise DataError(f"the answer {wanted!r} is no span", "give [start, end] in seconds")
    read = read_span(prediction, duration)
    start, end = sorted(float(value) for value in wanted)
    iou = overlap(read, (start, end))
    video = str(reference.get("video", reference.get("id", "")))
    return {READ: list(read), "video": video, "iou": iou, "hit": float(iou >= 0.5)}


def over_videos(name: str) -> Callable[[Sequence[Marks]], float]:
    """Return the mean of the marks `name`, first over the questions about a video, then over videos."""

    def aggregate(marks: Sequence[Marks]) -> float:
        by_video: dict[str, list[float]] = {}
        for mark in marks:
            by_video.setdefault(mark["video"], []).append(mark[name])
        means = [math.fsum(values) / len(values) for values in by_video.values()]
        return math.fsum(means) / len(means) if means else math.nan

    return aggregate


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> float:
    if not _is_number(value) or value <= 0:
        raise DataError(f"the duration {value!r} is no length of a video", "give seconds above 0")
    return float(value)


TEMPORAL = Scorer(
    score=temporal,
    metrics={
        "miou": Metric(aggregate=over_videos("iou")),
        "precision_at_0.5": Metric(aggregate=over_videos("hit")),
    },
    needs=("answer", "duration"),
)


def time_span(prediction: str, reference: Reference) -> Marks:
    """Score a span of time tokens; the answer is one too, so that the video's length does not matter.

    Raises:
        DataError: The answer names no span.
    """
    answer = str(reference.get("answer"))
    if len(_TIME_TOKEN.findall(answer)) < 2:
        raise DataError(f"the answer {answer!r} has no two time tokens", "tune a model with time tokens on <seconds>")
    read, wanted = (read_span(text, float(NUM_TIME_TOKENS - 1)) for text in (prediction, answer))
    iou = overlap(read, wanted)
    return {READ: list(read), "video": str(reference.get("id", "")), "iou": iou, "hit": float(iou >= 0.5)}


TIME_SPAN = Scorer(score=time_span, metrics=TEMPORAL.metrics)
