"""What a model was evaluated on, as shares of bins: the thing that traffic is compared with."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvila.errors import ConfigError
from nvila_platform.drift.features import FEATURES, Values

BINS = 10
SCHEMA = 1
# Fewer values than this per bin make the comparison a lottery.
LEAST_PER_BIN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Bins:
    """One feature's distribution.

    Args:
        edges: Between the bins, rising; bin k holds edges[k - 1] <= value < edges[k].
        counts: Values in each of the len(edges) + 1 bins.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def place(self, value: float) -> int:
        """Return the bin of a value."""
        return bisect_right(self.edges, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Distributions of the features over an evaluation set.

    Args:
        data: What it was made from, for people.
        samples: Requests that were described.
        features: Feature -> its distribution.
    """

    data: str
    samples: int
    features: Mapping[str, Bins]

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        from nvila_platform.artifacts import write_atomically

        record = {"schema": SCHEMA, "data": self.data, "samples": self.samples}
        record["features"] = {name: asdict(bins) for name, bins in self.features.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(record, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Read what `write` wrote.

        Raises:
            ConfigError: There is no such file, or it is something else.
        """
        fix = "make one: nvila drift reference DATA --out FILE"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["schema"] != SCHEMA:
                raise ConfigError(f"{path} is of schema {record['schema']}, this version reads {SCHEMA}", fix)
            features = {str(name): _bins(entry) for name, entry in record["features"].items()}
            return cls(data=str(record["data"]), samples=int(record["samples"]), features=features)
        except OSError as e:
            raise ConfigError(f"{path} cannot be read: {e.strerror}", fix) from e
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ConfigError(f"{path} is no reference of drift: {e!r}", fix) from e


def build_reference(observed: Iterable[Values], data: str) -> Reference:
    """Describe an evaluation set.

    Bins hold about equally many values each, so that a shift anywhere shows; where many values are equal there are
    fewer bins.

    Args:
        observed: Features of each request and its answer.
        data: Name of the set.

    Raises:
        ConfigError: There is nothing in it.
    """
    values: dict[str, list[float]] = {}
    samples = 0
    for one in observed:
        samples += 1
        for name, found in one.items():
            values.setdefault(name, []).extend(found)
    if not samples:
        raise ConfigError(f"{data} has no usable sample to compare traffic with", "choose other data")
    features = {name: _measure(values[name]) for name in FEATURES if values.get(name)}
    return Reference(data=data, samples=samples, features=features)


def _measure(values: list[float]) -> Bins:
    ordered = sorted(values)
    bins = max(2, min(BINS, len(ordered) // LEAST_PER_BIN))
    cuts = [ordered[len(ordered) * k // bins] for k in range(1, bins)]
    # The lowest value is no edge: nothing would lie below it.
    edges = tuple(sorted({cut for cut in cuts if cut > ordered[0]}))
    if not edges:
        # All values are equal: what is smaller and what is greater are bins of their own.
        edges = (ordered[0], math.nextafter(ordered[0], math.inf))
    counts = [0] * (len(edges) + 1)
    for value in ordered:
        counts[bisect_right(edges, value)] += 1
    return Bins(edges=edges, counts=tuple(counts))


def _bins(entry: Mapping[str, Any]) -> Bins:
    edges, counts = tuple(map(float, entry["edges"])), tuple(map(int, entry["counts"]))
    if len(counts) != len(edges) + 1 or list(edges) != sorted(edges) or not edges or min(counts) < 0:
        raise ValueError("edges and counts do not belong together")
    return Bins(edges=edges, counts=counts)
