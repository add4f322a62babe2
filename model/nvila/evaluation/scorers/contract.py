"""What a scorer is: marks for every sample, and metrics over the marks of all samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvila.errors import DataError

# What is known about a sample besides its question: `answer`, `choices`, `category` and what else a task maps.
Reference = Mapping[str, Any]
# JSON values: a number for every metric that a sample has on its own, and what metrics over all samples count.
Marks = dict[str, Any]
# What was read from the answer.
READ = "read"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One number over the marks of all samples.

    Args:
        aggregate: Computes it; NaN when no sample counts.
        is_mean: Whether it is the mean of the samples' own marks of this name.
        higher_is_better: Which way is good; None when neither is.
    """

    aggregate: Callable[[Sequence[Marks]], float]
    is_mean: bool = False
    higher_is_better: bool | None = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """A way to score answers.

    Args:
        score: Gives a sample's marks for an answer and its reference.
        metrics: By name; the first one is the one that tables show.
        needs: Fields that every reference must have.
        filter: How the answer is read, in the words of lmms-eval: `none`, `flexible-extract`.
    """

    score: Callable[[str, Reference], Marks]
    metrics: Mapping[str, Metric]
    needs: tuple[str, ...] = ("answer",)
    filter: str = "none"

    @property
    def main(self) -> str:
        """Name of the metric that tables show."""
        return next(iter(self.metrics))


def mean_metric(name: str, *, higher_is_better: bool | None = True) -> Metric:
    """Return the metric that is the mean of the marks `name`, over the samples that have one."""

    def aggregate(marks: Sequence[Marks]) -> float:
        values = [float(mark[name]) for mark in marks if mark.get(name) is not None]
        return math.fsum(values) / len(values) if values else math.nan

    return Metric(aggregate=aggregate, is_mean=True, higher_is_better=higher_is_better)


def mean_metrics(*names: str) -> dict[str, Metric]:
    """Return mean metrics by name."""
    return {name: mean_metric(name) for name in names}


def answers_of(reference: Reference, name: str = "answer") -> list[str]:
    """Return the accepted answers of a reference.

    Data sets write one answer as a text or a number, several as a list of these or of `{"answer": ...}`.

    Raises:
        DataError: There is none, or it is of another kind.

    Example:
        >>> answers_of({"answer": [{"answer": "two"}, 2]})
        ['two', '2']
    """
    value = reference.get(name)
    values = list(value) if isinstance(value, list | tuple) else [value]
    found = [_text(item.get("answer") if isinstance(item, Mapping) else item, name) for item in values]
    if not found:
        raise DataError(f"field '{name}' is an empty list", "give every sample at least one answer")
    return found


def _text(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise DataError(f"field '{name}' holds {kind}", "an answer is a text, a number or a list of them")
    return str(value)
