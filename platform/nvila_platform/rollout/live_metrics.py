"""What users got from two revisions side by side, read from Prometheus.

Pods are told apart by the label `pod`, which a PodMonitor (charts/nvila-observability) sets.
"""

from __future__ import annotations

from nvila.evaluation.live_gate import LiveMeasured
from nvila_platform.prometheus import Prometheus

# Reasons of rejections that are the server's fault. A client's own mistakes say nothing about a revision.
FAULTS = (
    "bodies_full",
    "broken",
    "capability",
    "checkpoint",
    "deadline",
    "failed",
    "infrastructure",
    "internal_error",
    "media_memory_full",
    "media_store_unavailable",
    "model_not_ready",
    "overloaded",
    "queue_full",
    "resource",
    "stopping",
    "timeout",
)
# Shorter than two scrapes nothing can be seen.
_SHORTEST_S = 60


class LiveMetrics:
    """Measures the revisions of one endpoint.

    Args:
        prometheus: Where its metrics are.
        namespace: Of the endpoint.
        endpoint: Its name, which is the model's in requests.
    """

    def __init__(self, prometheus: Prometheus, namespace: str, endpoint: str) -> None:
        self._prometheus = prometheus
        self._of = f'namespace="{namespace}",model_name="{endpoint}"'

    def measure(self, pods: tuple[str, str], seconds: float) -> LiveMeasured:
        """Measure what happened in the last seconds.

        Args:
            pods: Patterns of the names of the new pods and of those that serve.
            seconds: Length of the time.

        Raises:
            InfrastructureError: Prometheus does not answer.
        """
        window = max(_SHORTEST_S, round(seconds))
        new, old = pods
        ok = self._prometheus.value(self.answered(new, window)) or 0.0
        failed = self._prometheus.value(self.failed(new, window)) or 0.0
        first = self._prometheus.value(self.first_token(new, window))
        other = self._prometheus.value(self.first_token(old, window))
        return LiveMeasured(
            requests=ok + failed,
            error_rate=failed / (ok + failed) if ok + failed else None,
            ttft_p95_ms=None if first is None else 1000 * first,
            live_ttft_p95_ms=None if other is None else 1000 * other,
        )

    def answered(self, pods: str, window: int) -> str:
        """Return the query of requests that were answered; `abort` is none: its client left, or its time ran out."""
        ended = "stop|length"
        return _count(f'nvila:request_success_total{{{self._of},pod=~"{pods}",finished_reason=~"{ended}"}}', window)

    def failed(self, pods: str, window: int) -> str:
        """Return the query of requests that the server failed on."""
        reasons = "|".join(FAULTS)
        return _count(f'nvila:request_rejected_total{{{self._of},pod=~"{pods}",reason=~"{reasons}"}}', window)

    def first_token(self, pods: str, window: int) -> str:
        """Return the query of the 95th percentile of the time to the first token, in seconds."""
        series = f'nvila:time_to_first_token_seconds_bucket{{{self._of},pod=~"{pods}"}}'
        return f"histogram_quantile(0.95, sum by (le) (increase({series}[{window}s])))"


def _count(series: str, window: int) -> str:
    # A series that is born in the window starts at its first event, which `increase` does not see.
    return f"sum(({series} unless {series} offset {window}s) or increase({series}[{window}s]))"
