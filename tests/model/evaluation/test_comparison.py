"""Comparisons of two logs: what is paired, what the numbers are, what flipped, and what cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nvila.errors import ConfigError, DataError
from nvila.evaluation.answer_log import Answer, AnswerLog
from nvila.evaluation.asking import Question
from nvila.evaluation.comparison import TaskComparison, compare
from nvila.evaluation.results import results_file, sample_lines, summarize
from nvila.evaluation.rows import open_rows
from nvila.evaluation.runner import read_samples, score_all
from nvila.evaluation.sample_logs import Logged, find_results, read_logged
from nvila.evaluation.statistics import compare_aggregates, mcnemar
from nvila.evaluation.task import Task

Log = Callable[..., Logged]
ROWS = [{"q": f"question {n}", "a": "yes", "c": "even" if n % 2 == 0 else "odd"} for n in range(8)]
FIELDS = {"question": "q", "answer": "a", "category": "c"}


@pytest.fixture
def log(tmp_path: Path, make_task: Callable[..., Task], write_rows: Callable[..., Path]) -> Log:
    """Write an evaluation with given answers; None stands for a sample that could not be asked."""

    def write(
        name: str, answers: Sequence[str | None], rows: Sequence[dict[str, Any]] = ROWS, **changed: Any
    ) -> Logged:
        task = make_task(**{"fields": FIELDS, "group_by": "category"} | changed)
        data = open_rows(task, str(write_rows(*rows, name=f"{name}.jsonl")))
        kept = AnswerLog.open(tmp_path / name, task, name, {})
        asked = [item for item in read_samples(task, data) if isinstance(item, Question)]
        pairs = zip(asked, answers, strict=True)
        kept.append(0, [(q.digest, Answer(text, None if text else "broken")) for q, text in pairs])
        result = summarize(task, data.name, score_all(task, data, kept), seed=0)
        file = tmp_path / name / "20260101_results.json"
        file.write_text(json.dumps(results_file([result], {"model_name": name})))
        (tmp_path / name / "20260101_samples_demo.jsonl").write_text("".join(sample_lines(result)))
        return read_logged(file)

    return write


def one(reference: Logged, candidate: Logged) -> TaskComparison:
    return compare(reference, candidate, seed=0)["demo"]


def test_a_hand_worked_comparison(log: Log) -> None:
    a = log("a", ["yes", "yes", "yes", "yes", "yes", "no", "no", "no"])
    b = log("b", ["yes", "no", "no", "no", "yes", "yes", "no", "no"])
    found = one(a, b)
    assert (found.main, found.difference.samples) == ("exact_match", 8)
    assert (found.difference.reference, found.difference.candidate) == (5 / 8, 3 / 8)
    assert found.difference.paired.difference == -0.25
    assert found.difference.drop == 0.25
    assert found.difference.paired.p_value == mcnemar(1, 3) == 0.625
    assert [pair[0].id for pair in found.worse] == ["1", "2", "3"]
    assert [pair[1].answer for pair in found.better] == ["yes"]
    # Categories: samples 0, 2, 4, 6 and 1, 3, 5, 7.
    assert {name: (d.samples, d.reference, d.candidate) for name, d in found.categories.items()} == {
        "even": (4, 0.75, 0.5),
        "odd": (4, 0.5, 0.25),
    }


def test_the_verdict_needs_an_interval_without_zero(log: Log) -> None:
    right, wrong = ["yes"] * 8, ["no"] * 8
    a, b, mixed = log("a", right), log("b", wrong), log("c", ["no", *right[1:]])
    assert one(a, b).difference.verdict == "worse"
    assert one(b, a).difference.verdict == "better"
    assert one(a, mixed).difference.verdict == "no difference shown"
    assert one(a, a).difference.verdict == "no difference shown"


def test_samples_without_a_score_on_one_side_are_left_out_and_counted(log: Log) -> None:
    a = log("a", ["yes"] * 6 + [None, None])
    b = log("b", [None] + ["yes"] * 7)
    found = one(a, b)
    assert (found.difference.samples, found.only_reference, found.only_candidate) == (5, 1, 2)


def test_other_data_are_other_samples(log: Log) -> None:
    a = log("a", ["yes"] * 8)
    half = [*ROWS[:4], *({**row, "a": "no"} for row in ROWS[4:])]
    assert one(a, log("b", ["yes"] * 8, half)).difference.samples == 4
    with pytest.raises(DataError, match="no sample of demo has a score of both"):
        one(a, log("c", ["yes"] * 8, [{**row, "a": "no"} for row in ROWS]))


def test_equal_samples_are_paired_one_by_one(log: Log) -> None:
    rows = [ROWS[0]] * 3
    # Equal questions share one answer in the log of answers.
    found = one(log("a", ["yes"] * 3, rows), log("b", ["no"] * 3, rows))
    assert (found.difference.samples, len(found.worse)) == (3, 3)


def test_an_order_of_its_own_changes_nothing(log: Log) -> None:
    a = log("a", ["yes", "no"] * 4)
    turned = log("b", ["yes"] * 4 + ["no"] * 4, list(reversed(ROWS)))
    straight = log("c", ["no"] * 4 + ["yes"] * 4)
    assert one(a, turned).difference == one(a, straight).difference


@pytest.mark.parametrize(
    ("changed", "message"), [({"version": 2}, "as version 1 and as version 2"), ({"prompt": "Q {question}"}, "two")]
)
def test_another_task_is_refused(log: Log, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        one(log("a", ["yes"] * 8), log("b", ["yes"] * 8, **changed))


def test_a_metric_over_all_samples(log: Log) -> None:
    a = log("a", ["yes", "no"] * 4, scorer="pope")
    b = log("b", ["no", "no"] * 4, scorer="pope")
    metrics = one(a, b).metrics
    assert metrics["accuracy"].paired.test == "mcnemar-exact"
    f1 = metrics["f1"]
    assert f1.paired.test == "swaps"
    assert f1.reference == pytest.approx(2 / 3)
    assert f1.candidate == 0
    assert f1.paired.low < -0.1 < 0 < f1.paired.p_value < 0.2


def test_swapping_finds_what_the_exact_test_finds() -> None:
    pairs = [(1.0, 0.0)] * 9 + [(0.0, 1.0)] + [(1.0, 1.0)] * 10

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    found = compare_aggregates(pairs, mean, seed=0, resamples=4000)
    assert found.difference == pytest.approx(-0.4)
    assert found.p_value == pytest.approx(mcnemar(1, 9), abs=0.008)
    assert found.low == pytest.approx(-0.65, abs=0.06)
    with pytest.raises(ValueError, match="no samples"):
        compare_aggregates([], mean, seed=0)


def test_evaluations_without_a_common_task(log: Log) -> None:
    a = log("a", ["yes"] * 8)
    with pytest.raises(ConfigError, match="share no task"):
        compare(a, Logged(file=a.file, results={}, tasks={}), seed=0)


def test_the_newest_results_of_a_folder(log: Log, tmp_path: Path) -> None:
    file = log("a", ["yes"] * 8).file
    newer = file.with_name("20270101_results.json")
    newer.write_bytes(file.read_bytes())
    assert (find_results(file), find_results(file.parent)) == (file, newer)
    assert find_results(tmp_path) is find_results(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("20260101_results.json", "{", "cannot be read"),
        ("20260101_results.json", '{"results": {"demo": {}}}', "no result file of nvila evaluate"),
        ("20260101_samples_demo.jsonl", None, "is missing"),
        ("20260101_samples_demo.jsonl", '{"doc_id": 0}\n', ":1 is no sample"),
        ("20260101_samples_demo.jsonl", "", "has 0 samples, 20260101_results.json counts 8"),
    ],
)
def test_a_damaged_evaluation_says_so(log: Log, name: str, text: str | None, message: str) -> None:
    file = log("a", ["yes"] * 8).file
    if text is None:
        file.with_name(name).unlink()
    else:
        file.with_name(name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_logged(file)
