"""The Pareto front of points, and the cheapest of them that loses little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """A point as the front sees it.

    Args:
        cost: What it costs; less is better.
        score: What it reaches; more is better.
    """

    cost: float
    score: float


def pareto_front(points: Sequence[Weighed]) -> list[int]:
    """Return the points that no other one beats, cheapest first; of equal points the first.

    Example:
        >>> pareto_front([Weighed(cost=1, score=0.5), Weighed(cost=2, score=0.4), Weighed(cost=3, score=0.9)])
        [0, 2]
    """
    order = sorted(range(len(points)), key=lambda index: (points[index].cost, -points[index].score, index))
    front: list[int] = []
    for index in order:
        if not front or points[index].score > points[front[-1]].score:
            front.append(index)
    return front


def best(points: Sequence[Weighed]) -> int:
    """Return the point with the highest score, the cheapest of equal ones."""
    return min(range(len(points)), key=lambda index: (-points[index].score, points[index].cost, index))


def recommended(points: Sequence[Weighed], loss: float) -> int:
    """Return the cheapest point whose score is at most `loss` below the best.

    Raises:
        ValueError: There are no points.

    Example:
        >>> recommended([Weighed(cost=1, score=0.5), Weighed(cost=2, score=0.79), Weighed(cost=3, score=0.8)], 0.01)
        1
    """
    if not points:
        raise ValueError("no points to choose from")
    # A share of right answers is a fraction: 0.80 - 0.79 is a hair more than 0.01 in floating point.
    least = points[best(points)].score - loss - 1e-9
    good = [index for index, point in enumerate(points) if point.score >= least]
    return min(good, key=lambda index: (points[index].cost, -points[index].score, index))
