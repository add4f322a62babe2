"""Vision-and-language navigation (R2R): navigation error, oracle success, success, and SPL.

A prediction is the path that was walked, as JSON `[[x, y], ...]` in metres, or the model's sentences ("turn left 15
degrees, move forward 75 cm, stop"), which are then followed on an open plane. No wall stops anybody there: figures to
compare with published ones need the paths of a simulator.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from nvila.errors import DataError
from nvila.evaluation.scorers.contract import READ, Marks, Reference, Scorer, mean_metric

SUCCESS_M = 3.0
_UNITS = {"cm": 0.01, "centimeter": 0.01, "centimeters": 0.01, "m": 1.0, "meter": 1.0, "meters": 1.0, "metres": 1.0}
_ACTION = re.compile(
    r"turn(?:ed|ing)?\s+(?:to\s+the\s+)?(?P<side>left|right)\s+(?:by\s+)?(?P<angle>\d+(?:\.\d+)?)\s*(?:degrees?|deg|°)"
    r"|(?:move|go|walk)\s+forward\s+(?:by\s+)?(?P<length>\d+(?:\.\d+)?)\s*(?P<unit>cm|centimeters?|meters?|metres|m)\b"
    r"|(?P<stop>\bstop\b)",
    re.IGNORECASE,
)

Point = tuple[float, ...]


def walk(text: str, start: Point, heading_deg: float = 0.0) -> list[Point]:
    """Follow sentences from a place.

    Args:
        text: Turns in degrees and moves in cm or m; nothing after "stop" counts.
        start: x and y in metres.
        heading_deg: Direction at the start; 0 looks along y, 90 along x.

    Example:
        >>> walk("move forward 75 cm, turn right 90 degrees, move forward 1 m, stop", (0.0, 0.0))
        [(0.0, 0.0), (0.0, 0.75), (1.0, 0.75)]
    """
    path, heading = [tuple(start)], heading_deg
    for match in _ACTION.finditer(text):
        if match["stop"]:
            break
        if match["side"]:
            heading += float(match["angle"]) * (1 if match["side"].lower() == "right" else -1)
            continue
        length = float(match["length"]) * _UNITS[match["unit"].lower()]
        x, y, *rest = path[-1]
        radians = math.radians(heading)
        path.append((round(x + length * math.sin(radians), 9), round(y + length * math.cos(radians), 9), *rest))
    return path


def navigation(prediction: str, reference: Reference) -> Marks:
    """Score a path.

    `answer` is the reference path, whose first point is the start and whose last is the goal; its length is the
    shortest way. `heading` is the direction at the start in degrees.

    Raises:
        DataError: The reference is no path.
    """
    wanted = _points(reference.get("answer"))
    if wanted is None:
        raise DataError("the answer is no path", "give [[x, y], ...] in metres, from the start to the goal")
    taken = _path(prediction) or walk(prediction, wanted[0], float(reference.get("heading") or 0.0))
    if len(taken[0]) != len(wanted[0]):
        taken = [wanted[0]]
    goal = wanted[-1]
    error = math.dist(taken[-1], goal)
    success = float(error <= SUCCESS_M)
    shortest = _length(wanted)
    longest = max(_length(taken), shortest)
    return {
        READ: [list(point) for point in taken],
        "navigation_error": error,
        "oracle_success": float(min(math.dist(point, goal) for point in taken) <= SUCCESS_M),
        "success": success,
        "spl": success * (shortest / longest if longest > 0 else 1.0),
    }


def _length(path: Sequence[Point]) -> float:
    return math.fsum(math.dist(a, b) for a, b in pairwise(path))


def _path(prediction: str) -> list[Point] | None:
    try:
        return _points(json.loads(prediction))
    except (ValueError, RecursionError):
        return None


def _points(value: Any) -> list[Point] | None:
    """Return a path of one or more points of two or three coordinates each."""
    if not isinstance(value, list | tuple) or not value:
        return None
    points = [tuple(point) if isinstance(point, list | tuple) else () for point in value]
    is_path = len(points[0]) in (2, 3) and all(len(point) == len(points[0]) for point in points)
    return [tuple(map(float, point)) for point in points] if is_path and _are_numbers(points) else None


def _are_numbers(points: Sequence[tuple[Any, ...]]) -> bool:
    flat = [value for point in points for value in point]
    try:
        return all(type(value) in (int, float) and math.isfinite(value) for value in flat)
    except OverflowError:
        return False


NAVIGATION = Scorer(
    score=navigation,
    metrics={
        "success": mean_metric("success"),
        "spl": mean_metric("spl"),
        "oracle_success": mean_metric("oracle_success"),
        "navigation_error": mean_metric("navigation_error", higher_is_better=False),
    },
)
