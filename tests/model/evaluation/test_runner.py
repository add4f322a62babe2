"""Running a task: batches, interruption, several processes, the cache, and samples that cannot be asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.model.evaluation.conftest import BASE, Echo

from nvila.errors import DataError, ResourceError
from nvila.evaluation.answer_log import Answer, AnswerLog
from nvila.evaluation.asking import Question
from nvila.evaluation.results import results_file, sample_lines, summarize
from nvila.evaluation.rows import open_rows
from nvila.evaluation.runner import Answerer, Outcome, TaskRun, check_failures, score_all
from nvila.evaluation.task import GenerationSettings

if TYPE_CHECKING:
    from tests.model.evaluation.conftest import MakeTask, WriteRows

    from nvila.evaluation.task import Task

ROWS = [{"q": f"q{n}", "a": f"q{n}" if n % 2 else "x"} for n in range(10)]
Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path, write_rows: WriteRows) -> Run:
    """Answer and score rows; `where` names the folder of answers."""

    def go(task: Task, answerer: Any, *, where: str = "answers", rows: Any = ROWS, **options: Any) -> Outcome:
        opened = open_rows(task, str(write_rows(*rows)))
        log = AnswerLog.open(tmp_path / where, task, "model", {})
        run = TaskRun(task=task, rows=opened, log=log, load=lambda: answerer, batch_size=3, **options)
        samples = run.run()
        outcome = score_all(task, opened, log, options.get("limit"))
        if run.world == 1:
            # What was read while asking is what reading again gives.
            assert score_all(task, opened, log, samples=samples) == outcome
        return outcome

    return go


def texts(outcome: Outcome) -> list[str]:
    return [sample.answer for sample in outcome.scored]


def test_questions_are_asked_in_blocks(run: Run, make_task: MakeTask) -> None:
    echo = Echo()
    outcome = run(make_task(generation={"stop": ["STOP"]}), echo)
    assert [len(batch) for batch in echo.batches] == [3, 3, 3, 1]
    assert outcome.total == 10
    assert all("STOP" not in text and text == text.strip() for text in texts(outcome))
    again = Echo()
    assert texts(run(make_task(generation={"stop": ["STOP"]}), again)) == texts(outcome)
    assert not again.batches


def test_a_stopped_run_ends_like_one_that_was_not(run: Run, make_task: MakeTask) -> None:
    whole = texts(run(make_task(), Echo(), where="whole"))
    with pytest.raises(KeyboardInterrupt):
        run(make_task(), Echo(stop_after=2))
    echo = Echo()
    assert texts(run(make_task(), echo)) == whole
    assert [batch[0] for batch in echo.batches] == ["q6", "q9"]


def test_any_number_of_processes_gives_the_same(run: Run, make_task: MakeTask) -> None:
    whole = texts(run(make_task(), Echo(), where="whole"))
    echoes = [Echo() for _ in range(3)]
    for rank, echo in enumerate(echoes):
        outcome = run(make_task(), echo, rank=rank, world=3)
    assert texts(outcome) == whole
    assert [len(echo.batches) for echo in echoes] == [2, 1, 1]
    first = run(make_task(), Echo(), where="half", rank=0, world=3)
    assert [failure.problem for failure in first.failures] == ["it was not asked"] * 6


def test_a_limit_and_more_later(run: Run, make_task: MakeTask) -> None:
    echo = Echo()
    assert run(make_task(), echo, limit=4).total == 4
    assert [len(batch) for batch in echo.batches] == [3, 1]
    echo = Echo()
    assert run(make_task(), echo).total == 10
    # The second block is asked whole, as ever, but what is known of it stays.
    assert [len(batch) for batch in echo.batches] == [3, 3, 1]


def test_another_version_or_model_is_asked_anew(run: Run, make_task: MakeTask, tmp_path: Path) -> None:
    run(make_task(), Echo())
    second = make_task(version=2)
    echo = Echo()
    run(second, echo)
    assert len(echo.batches) == 4
    root = tmp_path / "answers"
    assert AnswerLog.open(root, second, "model", {}).others(second, "model") == [1]
    other = AnswerLog.open(root, second, "another model", {})
    assert (other.answers(), other.others(second, "another model")) == ({}, [])
    assert AnswerLog.open(root, second, "model", {"dtype": "bf16"}).answers() == {}


def test_changed_data_is_asked_anew(run: Run, make_task: MakeTask) -> None:
    run(make_task(), Echo())
    echo = Echo()
    run(make_task(), echo, rows=[*ROWS[:4], {"q": "new", "a": "x"}, *ROWS[5:]])
    assert echo.batches == [["q3", "new", "q5"]]


def test_a_question_that_cannot_be_asked_is_no_wrong_answer(run: Run, make_task: MakeTask) -> None:
    echo = Echo(refuse="q4")
    outcome = run(make_task(), echo)
    assert [(failure.index, failure.problem) for failure in outcome.failures] == [
        (4, "q4 cannot be asked (leave it out)")
    ]
    assert len(outcome.scored) == 9
    assert echo.batches[1:5] == [["q3", "q4", "q5"], ["q3"], ["q4"], ["q5"]]
    # It is tried again, and an answer counts from then on.
    mended = run(make_task(), Echo())
    assert not mended.failures


def test_rows_that_cannot_be_read_are_counted(run: Run, make_task: MakeTask) -> None:
    outcome = run(make_task(), Echo(), rows=[ROWS[0], "{broken", {"q": "no answer", "a": []}, *ROWS[1:]])
    assert [(failure.index, failure.where) for failure in outcome.failures] == [
        (1, outcome.failures[0].where),
        (2, outcome.failures[1].where),
    ]
    assert outcome.failures[0].where.endswith("rows.jsonl:2")
    assert "broken JSON" in outcome.failures[0].problem
    assert "empty list" in outcome.failures[1].problem
    check_failures(make_task(), outcome, max_failed=0.2)
    with pytest.raises(DataError, match="2 of 12 samples of demo have no score"):
        check_failures(make_task(), outcome, max_failed=0.1)
    with pytest.raises(DataError, match="holds no samples"):
        check_failures(make_task(), Outcome([], []), 1.0)
    with pytest.raises(DataError, match="1 of 1"):
        check_failures(make_task(), Outcome([], outcome.failures[:1]), 1.0)


def test_torn_and_foreign_lines_of_a_log_are_passed_over(run: Run, make_task: MakeTask, tmp_path: Path) -> None:
    whole = texts(run(make_task(), Echo()))
    (file,) = (tmp_path / "answers").glob("*/answers-*.jsonl")
    data = file.read_bytes()
    file.write_bytes(b"\xff\xfe\n[1]\n{}\n" + data[: len(data) - 30])
    echo = Echo()
    assert texts(run(make_task(), echo)) == whole
    assert len(echo.batches) == 1


def test_a_log_that_cannot_be_written(make_task: MakeTask, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be kept"):
        AnswerLog.open(tmp_path / "file", make_task(), "model", {})
    log = AnswerLog.open(tmp_path / "logs", make_task(), "model", {})
    (log.directory / "answers-000.jsonl").mkdir()
    with pytest.raises(ResourceError, match="cannot be written"):
        log.append(0, [("x", Answer("y"))])


KILLED = """
import sys, time
from tests.model.evaluation.conftest import Echo
from nvila.evaluation.answer_log import AnswerLog
from nvila.evaluation.rows import open_rows
from nvila.evaluation.runner import TaskRun
from nvila.evaluation.task import parse_task
from pathlib import Path

class Slow(Echo):
    def answer(self, questions, settings):
        answers = super().answer(questions, settings)
        if len(self.batches) == 3:
            print("third", flush=True)
            time.sleep(60)
        return answers

task = parse_task(sys.argv[1], name="demo", where="demo.yaml")
log = AnswerLog.open(Path(sys.argv[3]), task, "model", {})
TaskRun(task=task, rows=open_rows(task, sys.argv[2]), log=log, load=Slow, batch_size=3).run()
"""


def test_a_killed_run_goes_on(run: Run, make_task: MakeTask, write_rows: WriteRows, tmp_path: Path) -> None:
    whole = run(make_task(), Echo(), where="whole")
    killed = KILLED.replace("load=Slow", "load=lambda slow=Slow(): slow")
    words = [json.dumps(BASE), str(write_rows(*ROWS)), str(tmp_path / "answers")]
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", killed, *words], stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "third\n"
        os.kill(process.pid, signal.SIGKILL)
    echo = Echo()
    resumed = run(make_task(), echo)
    assert [batch[0] for batch in echo.batches] == ["q6", "q9"]
    task = make_task()
    files = [
        (results_file([result], {}), list(sample_lines(result)))
        for result in (summarize(task, "rows", outcome, seed=0) for outcome in (whole, resumed))
    ]
    assert files[0] == files[1]


def test_result_files_have_the_shape_of_lmms_eval(run: Run, make_task: MakeTask) -> None:
    task = make_task(fields={"question": "q", "answer": "a", "kind": "a"}, group_by="kind", scorer="anls")
    outcome = run(task, Echo(refuse="q4"))
    result = summarize(task, "rows.jsonl", outcome, seed=0)
    file = results_file([result], {"model_name": "m"})
    assert set(file["results"]["demo"]) == {"alias", "anls,none", "anls_stderr,none"}
    assert file["versions"] == {"demo": 1}
    assert file["n-samples"] == {"demo": {"original": 10, "effective": 9}}
    assert file["failures"]["demo"]["count"] == 1
    assert file["failures"]["demo"]["first"][0]["index"] == 4
    assert file["higher_is_better"] == {"demo": {"anls": True}}
    assert len(file["task_hashes"]["demo"]) == 64
    assert file["intervals"]["demo"]["anls"]["level"] == 0.95
    assert file["categories"]["demo"]["x"]["samples"] == 4
    assert file["configs"]["demo"]["metadata"] == {"version": 1, "digest": task.digest, "where": "demo.yaml"}
    assert file["model_name"] == "m"
    json.dumps(file, allow_nan=False)
    lines = [json.loads(line) for line in sample_lines(result)]
    assert [line["doc_id"] for line in lines] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert lines[0]["resps"] == [[outcome.scored[0].answer]]
    assert {"doc", "target", "input", "filtered_resps", "doc_hash", "prompt_hash", "target_hash"} <= set(lines[0])
    assert lines[0]["anls"] == outcome.scored[0].marks["anls"]


def test_progress_is_told_in_samples(run: Run, make_task: MakeTask) -> None:
    told: list[tuple[int, int]] = []

    class Teller:
        def progress(self, phase: str, done: int, total: int, metrics: Any = None) -> None:
            told.append((done, total))

        def notice(self, text: str) -> None:
            raise AssertionError(text)

    run(make_task(), Echo(), reporter=Teller(), rank=1, world=2)
    assert told == [(3, 4), (4, 4)]


def test_the_model_is_loaded_only_when_there_is_something_to_ask(
    run: Run, make_task: MakeTask, tmp_path: Path, write_rows: WriteRows
) -> None:
    run(make_task(), Echo())

    def load() -> Answerer:
        raise AssertionError("there is nothing to ask")

    rows = open_rows(make_task(), str(write_rows(*ROWS)))
    log = AnswerLog.open(tmp_path / "answers", make_task(), "model", {})
    started = time.monotonic()
    TaskRun(task=make_task(), rows=rows, log=log, load=load, batch_size=3).run()
    assert time.monotonic() - started < 5


def test_an_answerer_may_say_why_it_has_no_answer(
    make_task: Callable[..., Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """A failure beside answers costs no second asking, is no wrong answer, and is asked again by the next run."""

    class Shaky:
        def __init__(self) -> None:
            self.asked: list[str] = []

        def answer(self, questions: Sequence[Question], settings: GenerationSettings) -> list[str | Answer]:
            self.asked += [question.prompt for question in questions]
            return [Answer(None, "status 500: down") if q.prompt == "q1" else "yes" for q in questions]

    task = make_task()
    rows = open_rows(task, str(write_rows(*({"q": f"q{n}", "a": "yes"} for n in range(3)))))
    log, shaky = AnswerLog.open(tmp_path / "answers", task, "m", {}), Shaky()
    TaskRun(task=task, rows=rows, log=log, load=lambda: shaky).run()
    assert shaky.asked == ["q0", "q1", "q2"]
    outcome = score_all(task, rows, log)
    assert [sample.answer for sample in outcome.scored] == ["yes", "yes"]
    assert [failure.problem for failure in outcome.failures] == ["status 500: down"]
    TaskRun(task=task, rows=rows, log=log, load=lambda: shaky).run()
    assert len(shaky.asked) == 6
