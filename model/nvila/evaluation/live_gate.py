"""The gate while a model serves: what its users got against what a policy allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nvila.evaluation.gate import Check, Verdict, at_least, at_most
from nvila.evaluation.policy import LiveLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveMeasured:
    """What was seen of a revision that takes a share of the traffic.

    Args:
        requests: Requests that it answered or failed on.
        error_rate: Share that it failed on; None without requests.
        ttft_p95_ms: 95th percentile of the time to the first token; None where nothing was seen.
        live_ttft_p95_ms: That of what it would replace, in the same time.
    """

    requests: float
    error_rate: float | None = None
    ttft_p95_ms: float | None = None
    live_ttft_p95_ms: float | None = None


def judge_live(limits: LiveLimits, measured: LiveMeasured) -> Verdict:
    """Apply limits; what they ask for and was not measured refuses."""
    return Verdict(checks=tuple(_checks(limits, measured)))


def is_enough(limits: LiveLimits, measured: LiveMeasured) -> bool:
    """Whether enough was seen to judge at all."""
    return measured.requests >= limits.min_requests


def _checks(limits: LiveLimits, measured: LiveMeasured) -> Iterator[Check]:
    yield at_least("live requests", measured.requests, limits.min_requests, "requests that it answered or failed on")
    if limits.max_error_rate is not None:
        why = "share that the server failed on" if measured.error_rate is not None else "there were no requests"
        yield at_most("live error rate", measured.error_rate, limits.max_error_rate, why)
    if limits.ttft_p95_ms is not None:
        why = "time to the first token" if measured.ttft_p95_ms is not None else "no first token was seen"
        yield at_most("live ttft p95_ms", measured.ttft_p95_ms, limits.ttft_p95_ms, why)
    if limits.max_ttft_ratio is not None:
        own, other = measured.ttft_p95_ms, measured.live_ttft_p95_ms
        ratio = own / other if own is not None and other else None
        why = "time to the first token over that of the live model, at the same time"
        known = why if ratio is not None else "no first token was seen of one of the two"
        yield at_most("live ttft ratio", ratio, limits.max_ttft_ratio, known)
