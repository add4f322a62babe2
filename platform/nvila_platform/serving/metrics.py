"""Prometheus metrics of the server: vLLM's names under our prefix, and OpenTelemetry's for generative models.

vLLM's names let its dashboards work with another prefix. `nvila:visual_load_tokens` has no counterpart there: visual
tokens of all requests that run or wait, so that an hour of video weighs more than an image when pods are scaled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nvila_platform.serving.identity import ModelIdentity

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from nvila.inference.engine import Usage

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LATENCY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
# As the semantic conventions of OpenTelemetry give them.
_OTEL_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_OTEL_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_OTEL_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_OTEL_TOKENS = tuple(4**power for power in range(14))
_KIND = "gen_ai_token_type"
_REASONS = ("stop", "length", "abort")


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

        def seconds(suffix: str, text: str, buckets: tuple[float, ...] = _LATENCY_BUCKETS) -> Histogram:
            return Histogram(f"nvila:{suffix}", text, label, buckets=buckets, registry=registry).labels(name)

        self.running = gauge("num_requests_running", "Requests in the engine now.")
        self.waiting = gauge("num_requests_waiting", "Requests waiting for the engine.")
        self.visual_load = gauge(
            "visual_load_tokens", "Visual tokens of all admitted requests, estimated at admission."
        )
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens processed, visual tokens included.")
        self._generation_tokens = counter("generation_tokens", "Tokens generated.")
        self._visual_tokens = counter("visual_tokens", "Prompt tokens that came from images and videos.")
        self._prefix_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._prefix_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._media_bytes = counter("media_bytes", "Encoded bytes of images and videos taken in.")
        self.media_load = seconds("media_load_seconds", "Fetching and decoding the media of a request.")
        self.queue_time = seconds("request_queue_time_seconds", "From decoded media to a worker of the engine.")
        self._prefill = seconds(
            "request_prefill_time_seconds", "From a worker to the first piece of text: tiles, tower, prompt."
        )
        self._decode = seconds("request_decode_time_seconds", "From the first piece of text to the last.")
        self.inter_token = seconds(
            "inter_token_latency_seconds", "Between two pieces of an answer.", _INTER_TOKEN_BUCKETS
        )
        self._first_token = seconds(
            "time_to_first_token_seconds", "From admission to the first piece of text.", _FIRST_TOKEN_BUCKETS
        )
        self._latency = seconds("e2e_request_latency_seconds", "From admission to the last token.")
        self._success = Counter(
            "nvila:request_success", "Requests that ended, by reason.", (*label, "finished_reason"), registry=registry
        )
        self._rejected = Counter(
            "nvila:request_rejected", "Requests answered with an error, by code.", (*label, "reason"), registry=registry
        )
        self._name = name
        for reason in _REASONS:
            # Series exist from the start, so that a rate over the first event is not lost.
            self._success.labels(name, reason)
        self._gen_ai = _GenAi(name, registry)
        self._info = Info("nvila:model", "The served model.", label, registry=registry).labels(name)
        self.serving(identity)

    def serving(self, identity: ModelIdentity) -> None:
        """Record which version new requests go to."""
        self._info.info({"version": identity.version, "digest": identity.digest})

    def first_token(self, seconds: float, prefill_s: float) -> None:
        """Record the wait for a request's first text, in all and since a worker took it up."""
        self._first_token.observe(seconds)
        self._prefill.observe(prefill_s)
        self._gen_ai.first.observe(seconds)

    def media(self, seconds: float, encoded_bytes: int) -> None:
        """Record that the media of a request were loaded."""
        self.media_load.observe(seconds)
        self._media_bytes.inc(encoded_bytes)

    def finished(self, reason: str, seconds: float, usage: Usage | None, *, decode_s: float | None = None) -> None:
        """Record the end of a generation: `stop`, `length`, or `abort` when nobody waits for it any more."""
        self._success.labels(self._name, reason).inc()
        self._latency.observe(seconds)
        self._gen_ai.duration.observe(seconds)
        if decode_s is not None:
            self._decode.observe(decode_s)
        if usage is not None:
            self._prompt_tokens.inc(usage.prompt_tokens)
            self._visual_tokens.inc(usage.visual_tokens)
            self._generation_tokens.inc(usage.completion_tokens)
            self._prefix_queries.inc(usage.prompt_tokens)
            self._prefix_hits.inc(usage.cached_tokens)
            self._gen_ai.usage(usage, decode_s)

    def rejected(self, reason: str) -> None:
        """Record a request that was answered with an error."""
        self._rejected.labels(self._name, reason).inc()


class _GenAi:
    """OpenTelemetry's `gen_ai.*` metrics, with names and labels as Prometheus exporters spell them."""

    def __init__(self, name: str, registry: CollectorRegistry) -> None:
        from prometheus_client import Histogram

        labels = {
            "gen_ai_operation_name": "chat",
            "gen_ai_provider_name": "nvila",
            "gen_ai_request_model": name,
        }

        def histogram(suffix: str, text: str, buckets: tuple[float, ...], *more: str) -> Any:
            made = Histogram(f"gen_ai_{suffix}", text, (*labels, *more), buckets=buckets, registry=registry)
            return made if more else made.labels(**labels)

        self.duration = histogram("server_request_duration_seconds", "Time of a request.", _OTEL_SECONDS)
        self.first = histogram("server_time_to_first_token_seconds", "Time to the first token.", _OTEL_FIRST)
        self._per_token = histogram(
            "server_time_per_output_token_seconds", "Time per token after the first.", _OTEL_PER_TOKEN
        )
        tokens = histogram("client_token_usage", "Tokens of a request.", _OTEL_TOKENS, _KIND)
        self._input = tokens.labels(**labels, **{_KIND: "input"})
        self._output = tokens.labels(**labels, **{_KIND: "output"})

    def usage(self, usage: Usage, decode_s: float | None) -> None:
        self._input.observe(usage.prompt_tokens)
        self._output.observe(usage.completion_tokens)
        if decode_s is not None and usage.completion_tokens > 1:
            self._per_token.observe(decode_s / (usage.completion_tokens - 1))
