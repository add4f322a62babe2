"""Prometheus metrics of the server, named after vLLM's so that its dashboards need only another prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nvila_platform.serving.identity import ModelIdentity

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from nvila.inference.engine import Usage

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LATENCY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class ServingMetrics:
    """All metrics of one served model.

    Args:
        identity: The served model; its name labels every series.
        registry: Where the metrics live; KServe's `/metrics` exposes prometheus-client's default registry.
    """

    def __init__(self, identity: ModelIdentity, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Gauge, Histogram, Info

        label, name = ("model_name",), identity.name

        def counter(suffix: str, text: str) -> Counter:
            return Counter(f"nvila:{suffix}", text, label, registry=registry).labels(name)

        def gauge(suffix: str, text: str) -> Gauge:
            return Gauge(f"nvila:{suffix}", text, label, registry=registry).labels(name)

        self.running = gauge("num_requests_running", "Requests in the engine now.")
        self.waiting = gauge("num_requests_waiting", "Requests waiting for the engine.")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens processed, visual tokens included.")
        self._generation_tokens = counter("generation_tokens", "Tokens generated.")
        self._visual_tokens = counter("visual_tokens", "Prompt tokens that came from images.")
        self._first_token = Histogram(
            "nvila:time_to_first_token_seconds",
            "From admission to the first piece of text.",
            label,
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        ).labels(name)
        self._latency = Histogram(
            "nvila:e2e_request_latency_seconds",
            "From admission to the last token.",
            label,
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        ).labels(name)
        self._success = Counter(
            "nvila:request_success", "Requests that ended, by reason.", (*label, "finished_reason"), registry=registry
        )
        self._rejected = Counter(
            "nvila:request_rejected", "Requests answered with an error, by code.", (*label, "reason"), registry=registry
        )
        self._name = name
        for reason in ("stop", "length", "abort"):
            # Series exist from the start, so that a rate over the first event is not lost.
            self._success.labels(name, reason)
        info = Info("nvila:model", "The served model.", label, registry=registry).labels(name)
        info.info({"version": identity.version, "digest": identity.digest})

    def first_token(self, seconds: float) -> None:
        """Record the wait for a request's first text."""
        self._first_token.observe(seconds)

    def finished(self, reason: str, seconds: float, usage: Usage | None) -> None:
        """Record the end of a generation: `stop`, `length`, or `abort` when nobody waits for it any more."""
        self._success.labels(self._name, reason).inc()
        self._latency.observe(seconds)
        if usage is not None:
            self._prompt_tokens.inc(usage.prompt_tokens)
            self._visual_tokens.inc(usage.visual_tokens)
            self._generation_tokens.inc(usage.completion_tokens)

    def rejected(self, reason: str) -> None:
        """Record a request that was answered with an error."""
        self._rejected.labels(self._name, reason).inc()
