"""The clock of one answer: what time went where, told to the metrics."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvila.inference.engine import Usage
    from nvila_platform.serving.metrics import ServingMetrics


class PhaseClock:
    """Made when a worker takes the request up; told of every piece, and of the end.

    Args:
        metrics: Where it reports.
        admitted_at: When the request was admitted, on the monotonic clock.
        submitted_at: When its media were ready and it began to wait for the engine.
    """

    def __init__(self, metrics: ServingMetrics, admitted_at: float, submitted_at: float) -> None:
        self._metrics = metrics
        self._admitted_at = admitted_at
        self._begun_at = time.monotonic()
        self._first_at: float | None = None
        self._last_at = self._begun_at
        metrics.queue_time.observe(self._begun_at - submitted_at)

    def piece(self, has_text: bool) -> None:
        """Note that a piece has come."""
        now = time.monotonic()
        if self._first_at is not None:
            self._metrics.inter_token.observe(now - self._last_at)
        elif has_text:
            self._first_at = now
            self._metrics.first_token(now - self._admitted_at, now - self._begun_at)
        self._last_at = now

    def finished(self, reason: str, usage: Usage | None) -> None:
        """Note the end."""
        now = time.monotonic()
        decode_s = None if self._first_at is None else now - self._first_at
        self._metrics.finished(reason, now - self._admitted_at, usage, decode_s=decode_s)
