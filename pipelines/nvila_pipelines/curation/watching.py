"""What `/metrics` says of a curation, from the shards on the disk until the choice is made."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nvila.errors import NvilaError

if TYPE_CHECKING:
    from nvila.curation.choosing import SourceCount
    from nvila.curation.shards import Shards
    from nvila.data.selection_counts import CurationCounts

logger = logging.getLogger(__name__)


class CurationWatch:
    """Counts records by source and state. A scrape reads the shards that are new; who scores counts nothing."""

    def __init__(self) -> None:
        self._shards: Shards | None = None
        self._seen: dict[int, CurationCounts] = {}
        self._chosen: CurationCounts = {}

    def follow(self, shards: Shards) -> None:
        """Count these shards, of all processes, from now on."""
        self._shards = shards

    def settle(self, sources: Mapping[str, SourceCount]) -> None:
        """Say what was chosen from now on."""
        self._chosen = {
            source: Counter(
                kept=count.kept, dropped=count.scored - count.kept, quarantined=count.records - count.scored
            )
            for source, count in sources.items()
        }

    def counts(self) -> CurationCounts:
        """Return the counts of this moment."""
        if self._chosen or self._shards is None:
            return self._chosen
        for number in self._shards.present():
            if number not in self._seen and (found := _counted(self._shards, number)) is not None:
                self._seen[number] = found
        sums: CurationCounts = {}
        for shard in tuple(self._seen.values()):
            for source, states in shard.items():
                sums.setdefault(source, Counter()).update(states)
        return sums


def _counted(shards: Shards, number: int) -> CurationCounts | None:
    """Count a shard; None for one that cannot be read, which ends the curation by itself."""
    from nvila.curation.problems import OK

    try:
        table = shards.read(number, columns=("source", "status"))
    except NvilaError as e:
        logger.warning("a scrape leaves out a shard: %s", e)
        return None
    counts: CurationCounts = {}
    for row in table.group_by(["source", "status"]).aggregate([([], "count_all")]).to_pylist():
        state = "scored" if row["status"] == OK else "quarantined"
        counts.setdefault(row["source"], Counter())[state] += row["count_all"]
    return counts
