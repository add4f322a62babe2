"""What the engine holds, read when Prometheus asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from nvila.inference.engine import EngineStats


class EngineCollector:
    """Tells Prometheus what an engine's `stats` say.

    Args:
        name: Of the served model; labels every series.
        stats: Reads them; of another engine after the model was replaced, whose counters begin at zero.
    """

    def __init__(self, name: str, stats: Callable[[], EngineStats]) -> None:
        self._name = name
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of this moment."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats = self._stats()
        gauges = (
            ("kv_cache_usage_perc", "Used part of the KV cache, 0 to 1.", stats.blocks_used / max(1, stats.blocks)),
            ("media_cache_bytes", "Bytes of visual tokens kept for media asked about again.", stats.media_bytes),
        )
        lookups = stats.media_hits + stats.media_misses
        counters = (
            ("mm_cache_queries", "Media looked up in the cache of visual tokens.", lookups),
            ("mm_cache_hits", "Media whose visual tokens were known.", stats.media_hits),
            ("num_preemptions", "Answers that gave their blocks to an earlier one.", stats.preemptions),
            ("engine_steps", "Steps of the model.", stats.steps),
            ("vision_encode_seconds", "Time in the vision tower and projector.", stats.encode_s),
        )
        for suffix, text, value in gauges:
            gauge = GaugeMetricFamily(f"nvila:{suffix}", text, labels=["model_name"])
            gauge.add_metric([self._name], value)
            yield gauge
        for suffix, text, value in counters:
            counter = CounterMetricFamily(f"nvila:{suffix}", text, labels=["model_name"])
            counter.add_metric([self._name], value)
            yield counter


def register_engines(name: str, current: Callable[[], object], first: object, registry: CollectorRegistry) -> None:
    """Offer the figures of the engine that serves; one that keeps none has none.

    Args:
        name: Of the served model.
        current: Returns the engine that serves at the moment.
        first: The one that serves from now on.
        registry: Where to offer them.
    """
    if callable(getattr(first, "stats", None)):
        registry.register(EngineCollector(name, lambda: cast("Any", current()).stats()))
