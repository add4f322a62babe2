"""The gate: every limit of a policy, what refuses, and policies that are wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nvila.errors import ConfigError
from nvila.evaluation.comparison import Difference, TaskComparison
from nvila.evaluation.gate import Measured, Verdict, judge
from nvila.evaluation.live_gate import LiveMeasured, is_enough, judge_live
from nvila.evaluation.policy import LiveLimits, Policy, parse_policy
from nvila.evaluation.sample_logs import Logged, TaskLog
from nvila.evaluation.statistics import Paired


def evaluation(scored: int = 90, total: int = 100, score: float = 0.8, open_score: float = 0.5) -> Logged:
    log = SimpleNamespace(samples=dict.fromkeys(range(scored)), total=total)
    results = {
        "results": {"demo": {"alias": "demo", "f1,none": score, "f1_stderr,none": 0.01, "recall,none": 0.3}},
        "configs": {"demo": {"metric_list": [{"metric": "f1"}, {"metric": "recall"}]}},
        "categories": {"demo": {"open": {"samples": 10, "f1": open_score}}},
    }
    return Logged(file=Path("r"), results=results, tasks={"demo": cast("TaskLog", log)})


def difference(value: float, low: float, high: float, *, higher: bool | None = True) -> Difference:
    paired = Paired(difference=value, low=low, high=high, p_value=0.5, test="swaps", better=0, worse=0)
    return Difference(samples=9, reference=0, candidate=value, paired=paired, higher_is_better=higher)


def live(**categories: Difference) -> dict[str, TaskComparison]:
    metrics = {
        "f1": difference(-0.02, -0.05, 0.01),
        "recall": difference(0.1, 0.05, 0.2),
        "error": difference(0.3, 0.1, 0.5, higher=False),
        "few": difference(-0.01, math.nan, math.nan),
    }
    found = SimpleNamespace(main="f1", metrics=metrics, categories=categories)
    return {"demo": cast("TaskComparison", found)}


def refused(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.checks if not check.passed]


def policy(**fields: Any) -> Policy:
    return Policy.model_validate({"tasks": {"demo": {}}} | fields)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        pytest.param({}, [], id="nothing-asked"),
        pytest.param({"min_samples": 90}, [], id="samples-at-the-limit"),
        pytest.param({"min_samples": 91}, ["demo samples"], id="too-few-samples"),
        pytest.param({"min_samples": 91, "tasks": {"demo": {"min_samples": 5}}}, [], id="a-task-of-its-own"),
        pytest.param({"max_failed": 0.09}, ["demo failed"], id="too-many-failures"),
        pytest.param({"max_failed": 0.0, "tasks": {"demo": {"max_failed": 0.5}}}, [], id="failures-of-a-task"),
        pytest.param({"tasks": {"demo": {"min_score": 0.8}}}, [], id="score-at-the-limit"),
        pytest.param({"tasks": {"demo": {"min_score": 0.81}}}, ["demo f1"], id="score-below"),
        pytest.param({"tasks": {"demo": {"metric": "recall", "min_score": 0.31}}}, ["demo recall"], id="other-metric"),
        pytest.param({"tasks": {"demo": {"metric": "recal", "min_score": 0.0}}}, ["demo recal"], id="unknown-metric"),
        pytest.param({"tasks": {"absent": {}}}, ["absent samples"], id="task-not-evaluated"),
        pytest.param({"max_drop": 0.02}, [], id="drop-at-the-limit"),
        pytest.param({"max_drop": 0.019}, ["demo drop"], id="drop-above"),
        pytest.param({"max_drop": 0.0, "tasks": {"demo": {"max_drop": 0.02}}}, [], id="drop-of-a-task"),
        pytest.param({"max_drop": 0.049, "surely": True}, ["demo drop"], id="the-interval-reaches-over-it"),
        pytest.param({"max_drop": 0.05, "surely": True}, [], id="the-interval-is-below"),
        pytest.param({"max_drop": 0.0, "tasks": {"demo": {"metric": "recall"}}}, [], id="a-gain-is-no-drop"),
        pytest.param({"max_drop": 0.2, "tasks": {"demo": {"metric": "error"}}}, ["demo drop"], id="lower-is-better"),
        pytest.param(
            {"max_drop": 0.4, "surely": True, "tasks": {"demo": {"metric": "error"}}}, ["demo drop"], id="surely-lower"
        ),
        pytest.param(
            {"max_drop": 0.5, "surely": True, "tasks": {"demo": {"metric": "few"}}}, ["demo drop"], id="no-interval"
        ),
        pytest.param({"tasks": {"demo": {"categories": {"open": {"min_score": 0.5}}}}}, [], id="category"),
        pytest.param({"tasks": {"demo": {"categories": {"open": {"min_score": 0.6}}}}}, ["demo open f1"], id="c-below"),
        pytest.param({"tasks": {"demo": {"categories": {"opn": {"min_score": 0}}}}}, ["demo opn f1"], id="c-unknown"),
        pytest.param({"tasks": {"demo": {"categories": {"open": {"max_drop": 0.1}}}}}, [], id="c-drop"),
        pytest.param(
            {"tasks": {"demo": {"categories": {"open": {"max_drop": 0.0}}}}}, ["demo open drop"], id="c-worse"
        ),
        pytest.param({"tasks": {"demo": {"categories": {"x": {"max_drop": 1}}}}}, ["demo x drop"], id="c-no-drop"),
        pytest.param({"latency": {"p50_ms": 30, "p95_ms": 50}}, [], id="fast-enough"),
        pytest.param({"latency": {"p50_ms": 29}}, ["latency p50_ms"], id="slow-median"),
        pytest.param({"latency": {"p95_ms": 49}}, ["latency p95_ms"], id="slow-tail"),
        pytest.param({"size": {"max_mib": 2}}, [], id="small-enough"),
        pytest.param({"size": {"max_mib": 1.9}}, ["size MiB"], id="too-large"),
        pytest.param({"size": {"max_ratio": 2}}, [], id="ratio"),
        pytest.param({"size": {"max_ratio": 1.9}}, ["size over live"], id="larger-than-live"),
    ],
)
def test_limits(fields: dict[str, Any], names: list[str]) -> None:
    measured = Measured(
        evaluation=evaluation(),
        against_live=live(open=difference(-0.1, -0.2, 0.1)),
        latency_ms=[50, 10, 30, 40, 20],
        size_bytes=2 * 2**20,
        live_size_bytes=2**20,
    )
    verdict = judge(policy(**fields), measured)
    assert refused(verdict) == names
    assert verdict.passed is (not names)


def test_without_a_live_model_losses_are_not_measured_and_that_is_said() -> None:
    fields = {"max_drop": 0.0, "size": {"max_ratio": 0.1}}
    verdict = judge(policy(**fields), Measured(evaluation=evaluation(), size_bytes=1))
    assert verdict.passed
    unknown = [check for check in verdict.checks if check.value is None]
    assert [check.name for check in unknown] == ["demo drop", "size over live"]
    assert {check.why for check in unknown} == {"there is no live model to compare with"}


def test_what_was_not_measured_refuses() -> None:
    fields = {"latency": {"p50_ms": 1e9}, "size": {"max_mib": 1e9, "max_ratio": 1e9}, "max_drop": 1.0}
    verdict = judge(policy(**fields), Measured(evaluation=evaluation(), against_live={}))
    assert refused(verdict) == ["demo drop", "latency p50_ms", "size MiB", "size over live"]


def test_the_reason_is_one_line() -> None:
    verdict = judge(policy(min_samples=91, tasks={"demo": {"min_score": 0.9}}), Measured(evaluation=evaluation()))
    assert verdict.reason == "demo samples is 90.0000, the limit is 91.0000; demo f1 is 0.8000, the limit is 0.9000"
    assert judge(policy(), Measured(evaluation=evaluation())).reason == "all 2 checks passed"
    assert not Verdict(checks=()).passed
    assert Verdict(checks=()).reason == "nothing was checked"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no policy"),
        ("{}", "the field 'tasks' is missing"),
        ("tasks: {}", "tasks is {}"),
        ("{tasks: {a: {min_scor: 1}}}", "there is no field 'tasks.a.min_scor' .did you mean 'min_score'"),
        ("{tasks: {a: {categories: {b: {max_dop: 1}}}}}", "did you mean 'max_drop'"),
        ("{tasks: {a: {}}, latency: {p90_ms: 1}}", "there is no field 'latency.p90_ms'"),
        ("{tasks: {a: {}}, min_sample: 1}", "did you mean 'min_samples'"),
        ("{tasks: {a: {}}, max_drop: -0.1}", "max_drop is -0.1: .*greater than or equal to 0"),
        ("{tasks: {a: {min_score: '0.9'}}}", "tasks.a.min_score is '0.9'"),
        ("{tasks: {a: {}}, size: {max_mib: 0}}", "size.max_mib is 0"),
    ],
)
def test_a_wrong_policy_names_the_field(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_policy(text, "policy.yaml")


@pytest.mark.parametrize(
    ("fields", "compares"),
    [
        ({}, False),
        ({"size": {"max_mib": 1}}, False),
        ({"max_drop": 0.1}, True),
        ({"tasks": {"demo": {"max_drop": 0.1}}}, True),
        ({"tasks": {"demo": {"categories": {"a": {"max_drop": 0.1}}}}}, True),
        ({"size": {"max_ratio": 1}}, True),
    ],
)
def test_whether_a_live_model_is_needed(fields: dict[str, Any], compares: bool) -> None:
    assert policy(**fields).compares is compares


# ----------------------------------------------------------------------------------------------------------------------
# While a model serves


def live_limits(text: str) -> LiveLimits:
    found = parse_policy(f"live: {text}", "policy.yaml").live
    assert found is not None
    return found


def test_live_limits_are_checked_one_by_one() -> None:
    limits = live_limits("{max_error_rate: 0.1, ttft_p95_ms: 500, max_ttft_ratio: 1.5, min_requests: 10}")
    good = LiveMeasured(requests=10, error_rate=0.1, ttft_p95_ms=300, live_ttft_p95_ms=200)
    assert judge_live(limits, good).passed
    assert [check.name for check in judge_live(limits, good).checks] == [
        "live requests",
        "live error rate",
        "live ttft p95_ms",
        "live ttft ratio",
    ]
    worse = {"requests": 9.0, "error_rate": 0.11, "ttft_p95_ms": 501.0, "live_ttft_p95_ms": 199.0}
    for field, value in worse.items():
        verdict = judge_live(limits, replace(good, **{field: value}))
        assert not verdict.passed, field
    assert is_enough(limits, good)
    assert not is_enough(limits, replace(good, requests=9.9))


def test_what_was_not_seen_of_a_rollout_refuses() -> None:
    limits = live_limits("{max_error_rate: 0.1, ttft_p95_ms: 500, max_ttft_ratio: 1.5, min_requests: 1}")
    verdict = judge_live(limits, LiveMeasured(requests=5))
    assert [check.passed for check in verdict.checks] == [True, False, False, False]
    assert "live error rate is not known: there were no requests" in verdict.reason
    only_new = LiveMeasured(requests=5, error_rate=0.0, ttft_p95_ms=100)
    assert "live ttft ratio is not known" in judge_live(limits, only_new).reason


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("live: {}", "nothing is limited"),
        ("live: {min_requests: 5}", "nothing is limited"),
        ("live: {max_error_rat: 0.1}", "there is no field 'live.max_error_rat'"),
        ("live: {max_error_rate: 2}", "live.max_error_rate is 2"),
        ("live: {ttft_p95_ms: 0}", "live.ttft_p95_ms is 0"),
    ],
)
def test_wrong_live_limits_are_named(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as failed:
        parse_policy(text, "policy.yaml")
    assert says in failed.value.message


def test_a_policy_may_be_about_rollouts_alone() -> None:
    policy = parse_policy("live: {max_error_rate: 0.1}", "policy.yaml")
    assert policy.tasks == {}
    assert policy.live is not None
    assert policy.live.min_requests == 20
