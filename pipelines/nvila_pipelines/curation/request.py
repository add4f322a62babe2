"""What is asked of a curation, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila_pipelines.curation.spec import DataSpec

if TYPE_CHECKING:
    from nvila.curation.choosing import Rule, SourceCount
    from nvila.curation.selection import Normalize


@dataclass(frozen=True, slots=True, kw_only=True)
class CurationRequest:
    """What somebody asked for.

    Args:
        out: Directory of everything that is made.
        rule: What to keep.
        data: The data set; None takes that of the scores in `out`.
        small: Folder of the small model; None likewise.
        large: Folder of the large model; None likewise.
        normalize: How delta is made of the likelihoods.
        dtype: Type of weights and activations. None, here and below, takes what the scores in `out` were made with.
        device: `auto`, `cpu` or `cuda`.
        sequential: Hold one model in memory at a time.
        processes: Local processes.
        threads: Threads of a process; without earlier scores the processes share the cores.
        shard_size: Records of a shard.
        batch_tokens: Most positions of a batch.
        max_bad: Largest share of records without a score; None takes what was accepted before, at first 10%.
        num_clusters: For the method `cluster`; None chooses.
    """

    out: Path
    rule: Rule
    data: DataSpec | None = None
    small: Path | None = None
    large: Path | None = None
    normalize: Normalize = "none"
    dtype: str | None = None
    device: str | None = None
    sequential: bool = False
    processes: int = 1
    threads: int | None = None
    shard_size: int | None = None
    batch_tokens: int | None = None
    max_bad: float | None = None
    num_clusters: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CurationResult:
    """What a run made.

    Args:
        out: The directory.
        records: Records of the data set.
        statuses: How many there are of each status.
        sources: What every source has, and what is kept.
        seconds: How long it took.
        report: The HTML file; None when nothing was written.
    """

    out: Path
    records: int
    statuses: Mapping[str, int]
    sources: Mapping[str, SourceCount]
    seconds: float
    report: Path | None = None

    @property
    def kept(self) -> int:
        """How many records are kept."""
        return sum(count.kept for count in self.sources.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "out": str(self.out),
            "records": self.records,
            "kept": self.kept,
            "statuses": dict(self.statuses),
            "sources": {source: asdict(count) for source, count in self.sources.items()},
            "seconds": round(self.seconds, 2),
            "report": str(self.report) if self.report is not None else None,
        }
