"""What curation made of the data, for `/metrics` of the curation itself and of the training on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nvila.errors import ResourceError
from nvila.progress import Reporter
from nvila_platform.settings import Settings
from nvila_platform.training.exporter import Exporter

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from nvila.data.selection_counts import CurationCounts

_HELP = (
    "Records of a data set by source: kept, dropped, quarantined (without a score), or scored while nothing is chosen."
)
# A label for each of thousands of sources would cost Prometheus more than it told anybody.
_MOST_SOURCES = 100
_OTHERS = "(others)"


class CurationCollector:
    """Offers how many records of each source are kept, dropped and in quarantine.

    Args:
        read: Returns the counts of this moment.
    """

    def __init__(self, read: Callable[[], CurationCounts]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """Count; called by prometheus-client for a scrape."""
        from prometheus_client.metrics_core import GaugeMetricFamily

        if not (counts := self._read()):
            return
        family = GaugeMetricFamily("nvila_curation_records", _HELP, labels=["source", "state"])
        for source, states in _bounded(counts).items():
            for state, count in states.items():
                family.add_metric([source, state], count)
        yield family


@contextmanager
def offer_curation(settings: Settings, read: Callable[[], CurationCounts], reporter: Reporter) -> Iterator[None]:
    """Offer `/metrics` of a curation where the settings ask for it.

    Args:
        settings: The address.
        read: Returns the counts of the moment of a scrape.
        reporter: Told when the address cannot be had.

    Raises:
        CapabilityError: prometheus-client is not installed.
    """
    exporter = None
    if settings.metrics_address:
        try:
            exporter = Exporter(settings.metrics_address, CurationCollector(read))
        except ResourceError as e:
            reporter.notice(f"no /metrics: {e}")
    try:
        yield
    finally:
        if exporter is not None:
            exporter.close()


def _bounded(counts: CurationCounts) -> CurationCounts:
    """Return the largest sources, the others under one name."""
    if len(counts) <= _MOST_SOURCES:
        return counts
    ranked = sorted(counts, key=lambda source: counts[source].total(), reverse=True)
    others: Counter[str] = Counter()
    for source in ranked[_MOST_SOURCES - 1 :]:
        others.update(counts[source])
    return {source: counts[source] for source in ranked[: _MOST_SOURCES - 1]} | {_OTHERS: others}
