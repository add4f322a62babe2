"""The clock of one answer: what time went where, told to the metrics."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvila.inference.engine import Usage
    from nvila_platform.serving.metrics import ServingMetrics
    from nvila_platform.serving.tracing import RequestTrace


class PhaseClock:
    """Made when a worker takes the request up; told of every piece, and of the end.

    Args:
        metrics: Where it reports.
        admitted_at: When the request was admitted, on the monotonic clock.
        submitted_at: When its media were ready and it began to wait for the engine.
        trace: Gets the phases as spans; None for none.
    """

    def __init__(
        self,
        metrics: ServingMetrics,
        admitted_at: float,
        submitted_at: float,
        trace: RequestTrace | None = None,
    ) -> None:
        self._trace = trace
        self._submitted_at = submitted_at
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
        if self._trace is None:
            return
        self._trace.phase("queue", self._submitted_at, self._begun_at)
        cached = 0 if usage is None else usage.cached_tokens
        self._trace.phase("prefill", self._begun_at, self._first_at or now, cached_tokens=cached)
        if self._first_at is not None:
            tokens = 0 if usage is None else usage.completion_tokens
            self._trace.phase("decode", self._first_at, now, finish_reason=reason, output_tokens=tokens)
        if usage is not None:
            self._trace.answered(reason, usage)
