"""Watches traffic: a sample of it, as counts of bins over the last requests, compared with the reference."""

from __future__ import annotations

import math
import random
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvila.errors import ConfigError
from nvila_platform.drift.features import Values
from nvila_platform.drift.reference import Bins, Reference

# Common reading of the population stability index: under 0.1 nothing happened, over 0.25 look into it.
NOTICE, ALARM = 0.1, 0.25
_PRIOR = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """One feature now against its reference.

    Args:
        feature: Its name.
        psi: Population stability index; None while too few values were seen.
        seen: Values in the window.
        counts: Values of the window in each bin.
    """

    feature: str
    psi: float | None
    seen: int
    counts: tuple[int, ...]


class DriftWatch:
    """Counts sampled requests; safe to call from several threads.

    Args:
        reference: What traffic is compared with.
        share: Share of requests that are looked at.
        window: Values of each feature that count, the newest ones.
        least: Values before a number is given.
        seed: Of the choice of requests; None takes the system's.

    Raises:
        ConfigError: A number is out of its range.
    """

    def __init__(
        self,
        reference: Reference,
        *,
        share: float = 0.1,
        window: int = 2000,
        least: int = 200,
        seed: int | None = None,
    ) -> None:
        if not 0 < share <= 1:
            raise ConfigError(f"the share of requests watched for drift is {share}", "give more than 0 and at most 1")
        if not 1 <= least <= window:
            raise ConfigError(f"drift needs {least} values of a window of {window}", "give 1 to the window")
        self.reference = reference
        self._share = share
        self._least = least
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._windows: dict[str, deque[int]] = {name: deque(maxlen=window) for name in reference.features}
        self._counts = {name: [0] * len(bins.counts) for name, bins in reference.features.items()}
        self.requests = 0

    def chosen(self) -> bool:
        """Decide whether the next request is looked at; asked once a request, before anything is computed."""
        with self._lock:
            return self._random.random() < self._share

    def add(self, values: Values, *, request: bool = True) -> None:
        """Count features of a chosen request, or of its answer.

        Args:
            values: Features; those that the reference does not know are left out.
            request: Whether this begins a request.
        """
        with self._lock:
            self.requests += request
            for name, found in values.items():
                bins = self.reference.features.get(name)
                if bins is not None:
                    for value in found:
                        self._count(name, bins, value)

    def drifts(self) -> list[Drift]:
        """Compare the window with the reference, feature by feature."""
        with self._lock:
            counts = {name: tuple(found) for name, found in self._counts.items()}
        result = []
        for name, found in counts.items():
            seen = sum(found)
            psi = stability_index(self.reference.features[name].counts, found) if seen >= self._least else None
            result.append(Drift(feature=name, psi=psi, seen=seen, counts=found))
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return the plain form of `/drift`: counts of bins, nothing of any single request."""
        return {
            "reference": {"data": self.reference.data, "samples": self.reference.samples},
            "share": self._share,
            "requests": self.requests,
            "least": self._least,
            "features": {
                drift.feature: {
                    "psi": drift.psi,
                    "seen": drift.seen,
                    "edges": list(self.reference.features[drift.feature].edges),
                    "reference": list(self.reference.features[drift.feature].counts),
                    "now": list(drift.counts),
                }
                for drift in self.drifts()
            },
        }

    def _count(self, name: str, bins: Bins, value: float) -> None:
        if not math.isfinite(value):
            return
        window, counts = self._windows[name], self._counts[name]
        if len(window) == window.maxlen:
            counts[window[0]] -= 1
        place = bins.place(value)
        window.append(place)
        counts[place] += 1


def stability_index(reference: Sequence[int], now: Sequence[int]) -> float:
    """Return the population stability index of two histograms over the same bins.

    sum over bins of (q - p) ln(q / p), p and q the shares, each bin with half a value added so that an empty one stays
    finite. 0 means equal; it is symmetric, and grows without bound.
    """
    bins = len(reference)
    before = [(count + _PRIOR) / (sum(reference) + _PRIOR * bins) for count in reference]
    after = [(count + _PRIOR) / (sum(now) + _PRIOR * bins) for count in now]
    return sum((q - p) * math.log(q / p) for p, q in zip(before, after, strict=True))


def verdict(psi: float | None) -> str:
    """Put an index into a word."""
    if psi is None:
        return "too few"
    return "drifted" if psi >= ALARM else "moving" if psi >= NOTICE else "steady"


def read_summary(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Check what a server's `/drift` answered.

    Raises:
        ConfigError: It is something else.
    """
    try:
        for feature in raw["features"].values():
            if not len(feature["now"]) == len(feature["reference"]) == len(feature["edges"]) + 1:
                raise ValueError("bins do not belong together")
        return {**raw, "requests": int(raw["requests"]), "reference": dict(raw["reference"])}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ConfigError(
            f"this is no summary of drift: {e!r}", "give the address of a server that watches drift"
        ) from e
