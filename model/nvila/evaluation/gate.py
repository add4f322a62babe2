"""The gate: what was measured against what a policy allows. It says no with reasons, and only yes lets a model pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nvila.evaluation.comparison import Difference, TaskComparison
from nvila.evaluation.policy import Policy, TaskLimits
from nvila.evaluation.sample_logs import Logged

NO_LIVE_MODEL = "there is no live model to compare with"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One limit.

    Args:
        name: What is limited.
        value: What was measured; None where nothing was.
        limit: The limit.
        passed: Whether the value keeps to it.
        why: Where the limit comes from, or why nothing was measured.
    """

    name: str
    value: float | None
    limit: float
    passed: bool
    why: str

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.name} is not known: {self.why}"
        return f"{self.name} is {self.value:.4f}, the limit is {self.limit:.4f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a gate says.

    Args:
        checks: Every limit of the policy.
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every limit is kept; a verdict without checks refuses."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def reason(self) -> str:
        """One line: what refuses, or that nothing does."""
        refused = [str(check) for check in self.checks if not check.passed]
        return "; ".join(refused) or (f"all {len(self.checks)} checks passed" if self.checks else "nothing was checked")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"passed": self.passed, "reason": self.reason, "checks": [asdict(check) for check in self.checks]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What is known about a candidate.

    Args:
        evaluation: Its evaluation.
        against_live: Its tasks compared with the live model's; None where there is no live model.
        latency_ms: Times of whole answers.
        size_bytes: Size of its weights; None where it is not known, as of an endpoint.
        live_size_bytes: Size of the live model's.
    """

    evaluation: Logged
    against_live: Mapping[str, TaskComparison] | None = None
    latency_ms: Sequence[float] = field(default=())
    size_bytes: int | None = None
    live_size_bytes: int | None = None


def judge(policy: Policy, measured: Measured) -> Verdict:
    """Apply a policy; what it asks for and was not measured refuses, but for losses where there is no live model."""
    checks: list[Check] = []
    for task, limits in policy.tasks.items():
        checks += _task_checks(policy, task, limits, measured)
    checks += _latency_checks(policy, measured.latency_ms)
    checks += _size_checks(policy, measured)
    return Verdict(checks=tuple(checks))


def at_least(name: str, value: float | None, limit: float, why: str) -> Check:
    """Return a check of a value that must not be below a limit."""
    return Check(name=name, value=value, limit=limit, passed=value is not None and value >= limit, why=why)


def at_most(name: str, value: float | None, limit: float, why: str) -> Check:
    """Return a check of a value that must not be above a limit."""
    return Check(name=name, value=value, limit=limit, passed=value is not None and value <= limit, why=why)


def not_applicable(name: str, limit: float, why: str) -> Check:
    """Return a check that passes because there is nothing to check."""
    return Check(name=name, value=None, limit=limit, passed=True, why=why)


def _task_checks(policy: Policy, task: str, limits: TaskLimits, measured: Measured) -> Iterator[Check]:
    log = measured.evaluation.tasks.get(task)
    least = policy.min_samples if limits.min_samples is None else limits.min_samples
    if log is None:
        yield at_least(f"{task} samples", None, least, "the task was not evaluated")
        return
    scored = len(log.samples)
    yield at_least(f"{task} samples", scored, least, "samples with a score")
    failed = policy.max_failed if limits.max_failed is None else limits.max_failed
    yield at_most(f"{task} failed", 1 - scored / log.total if log.total else 1.0, failed, "share without a score")
    if limits.min_score is not None:
        metric, value = _score(measured.evaluation, task, limits.metric)
        why = "the policy's minimum" if value is not None else f"the task has no metric '{limits.metric}'"
        yield at_least(f"{task} {metric}", value, limits.min_score, why)
    live = None if measured.against_live is None else measured.against_live.get(task)
    drop = policy.drop_limit(task)
    if drop is not None:
        found = None if live is None else live.metrics.get(limits.metric or live.main)
        yield _drop_check(f"{task} drop", found, drop, policy, measured)
    for name, category in limits.categories.items():
        values = measured.evaluation.results.get("categories", {}).get(task, {}).get(name, {})
        if category.min_score is not None:
            metric = limits.metric or _main(measured.evaluation, task)
            known = values.get(metric)
            why = "the policy's minimum" if known is not None else f"there is no such category or {metric} of it"
            yield at_least(f"{task} {name} {metric}", known, category.min_score, why)
        if category.max_drop is not None:
            found = None if live is None else live.categories.get(name)
            yield _drop_check(f"{task} {name} drop", found, category.max_drop, policy, measured)


def _drop_check(name: str, found: Difference | None, limit: float, policy: Policy, measured: Measured) -> Check:
    if measured.against_live is None:
        return not_applicable(name, limit, NO_LIVE_MODEL)
    if found is None:
        return at_most(name, None, limit, "both models have no such metric or category")
    if not policy.surely:
        return at_most(name, found.drop, limit, "paired with the live model, same samples")
    ends = (found.paired.low, found.paired.high)
    worst = ends[1] if found.higher_is_better is False else -ends[0]
    known = None if math.isnan(worst) else worst
    return at_most(name, known, limit, "paired with the live model, worse end of the 95% interval")


def _latency_checks(policy: Policy, times: Sequence[float]) -> Iterator[Check]:
    if policy.latency is None:
        return
    ordered = sorted(times)
    for name, limit, share in (("p50_ms", policy.latency.p50_ms, 0.5), ("p95_ms", policy.latency.p95_ms, 0.95)):
        if limit is not None:
            # The nearest rank: a value that was measured.
            value = ordered[math.ceil(share * len(ordered)) - 1] if ordered else None
            yield at_most(f"latency {name}", value, limit, f"of {len(times)} answers, one by one")


def _size_checks(policy: Policy, measured: Measured) -> Iterator[Check]:
    if policy.size is None:
        return
    size, live = measured.size_bytes, measured.live_size_bytes
    if policy.size.max_mib is not None:
        mib = None if size is None else size / 2**20
        why = "MiB of weights" if size is not None else "the size of an endpoint's model cannot be seen"
        yield at_most("size MiB", mib, policy.size.max_mib, why)
    if policy.size.max_ratio is not None:
        if measured.against_live is None:
            yield not_applicable("size over live", policy.size.max_ratio, NO_LIVE_MODEL)
        else:
            ratio = size / live if size is not None and live else None
            why = "weights over those of the live model" if ratio is not None else "a size is not known"
            yield at_most("size over live", ratio, policy.size.max_ratio, why)


def _main(evaluation: Logged, task: str) -> str:
    # The first metric of a task is its main one.
    return str(evaluation.results["configs"][task]["metric_list"][0]["metric"])


def _score(evaluation: Logged, task: str, metric: str | None) -> tuple[str, float | None]:
    name = metric or _main(evaluation, task)
    for key, value in evaluation.results["results"][task].items():
        if key.partition(",")[0] == name and value is not None:
            return name, float(value)
    return name, None
