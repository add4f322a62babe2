"""Verbs of the command as the work of Kubeflow tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.pipelines.conftest import Nvila, Result

from nvila.errors import ConfigError, NvilaError
from nvila_pipelines.steps.pipeline_job import PipelineJob
from nvila_pipelines.steps.verb import move_alias, run_gate_verb, run_verb
from nvila_platform.artifacts import content_key, utc_now, write_manifest
from nvila_platform.launch.outcome import left_error
from nvila_platform.mlflow_backend import connect
from nvila_platform.registration import register_model
from nvila_platform.registry import resolve, set_alias
from nvila_platform.settings import Settings
from nvila_platform.store import open_store

NO_JOB = PipelineJob(name="")
QUICK = ("--limit", "4", "--threads", "1")


@pytest.fixture
def shown(tmp_path: Path) -> tuple[Result, Result, Result]:
    return Result(tmp_path / "ui" / "metrics"), Result(tmp_path / "ui" / "report"), Result(tmp_path / "ui" / "result")


@pytest.fixture
def error(task: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NVILA_ERROR_FILE", str(tmp_path / "error.json"))
    return tmp_path / "error.json"


def said(file: Path) -> NvilaError:
    left = left_error(file)
    assert left is not None
    return left[0]


def runs_of(settings: Settings) -> list[Any]:
    client = connect(settings)
    experiment = client.get_experiment_by_name(settings.experiment)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], order_by=["start_time ASC"]))


def test_what_a_verb_says_becomes_artifacts(
    task: Settings, model_folder: Path, shown: tuple[Result, Result, Result]
) -> None:
    metrics, report, result = shown
    found = run_verb("evaluate", [str(model_folder), "--tasks", "easy_vqa", *QUICK], NO_JOB, *shown)
    assert json.loads(Path(result.path).read_text()) == found
    numbers = json.loads(Path(metrics.path).read_text())
    assert numbers == metrics.metadata
    score = numbers["results.easy_vqa.exact_match,none"]
    assert f"| results.easy_vqa.exact_match,none | {score:.6g} |" in Path(report.path).read_text()


def test_words_that_the_verb_does_not_take_are_named(error: Path, shown: tuple[Result, Result, Result]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_verb("evaluate", ["x", "--tusks", "easy_vqa"], NO_JOB, *shown)
    assert ended.value.code == 2
    assert isinstance(said(error), ConfigError)
    assert "--tusks" in said(error).message
    assert not Path(shown[2].path).exists()


def test_an_error_of_the_verb_is_left_for_the_parent(error: Path, shown: tuple[Result, Result, Result]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_verb("evaluate", ["/nowhere", "--tasks", "easy_vqa"], NO_JOB, *shown)
    assert ended.value.code == 2
    assert "/nowhere" in said(error).message


def test_a_refusal_is_an_answer_of_the_gate_and_of_no_other_verb(
    error: Path, model_folder: Path, shown: tuple[Result, Result, Result], tmp_path: Path
) -> None:
    strict = "{tasks: {easy_vqa: {min_score: 1.1}}}"
    assert run_gate_verb(str(model_folder), strict, QUICK, NO_JOB, *shown) is False
    assert "**refused**" in Path(shown[1].path).read_text()
    assert not json.loads(Path(shown[2].path).read_text())["passed"]
    policy = tmp_path / "policy.yaml"
    policy.write_text(strict)
    with pytest.raises(SystemExit) as ended:
        run_verb("gate", [str(model_folder), "--policy", str(policy), *QUICK], NO_JOB, *shown)
    assert ended.value.code == 1
    assert "nvila gate ended with 1" in said(error).message


def test_a_model_that_passes_the_gate(task: Settings, model_folder: Path, shown: tuple[Result, Result, Result]) -> None:
    assert run_gate_verb(str(model_folder), "{tasks: {easy_vqa: {min_score: 0.0}}}", QUICK, NO_JOB, *shown) is True
    assert "| passed |" in Path(shown[1].path).read_text()


def test_an_alias_moves_to_what_an_address_means_now(task: Settings) -> None:
    store = open_store(task)
    for number in (1, 2):
        key = content_key("quantize", {"number": number}, {}, "1")
        folder = store.work_dir("quantize", key)
        (folder / "w.txt").write_text(str(number))
        write_manifest(folder, step="quantize", key=key, config={}, inputs={}, code_version="1", started_at=utc_now())
        register_model(task, "nvila", store.publish(folder), None, {})
    set_alias(task, "nvila", "champion", 1)
    set_alias(task, "nvila", "candidate", 2)
    assert move_alias("models:/nvila@candidate", "champion") == "models:/nvila/2"
    assert resolve(task, "models:/nvila@champion").version == 2
    assert resolve(task, "models:/nvila@previous").version == 1


def test_what_is_promoted_is_what_was_judged_although_the_alias_moved(
    task: Settings, shown: tuple[Result, Result, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvila_pipelines.components.quantize_model import quantize_model

    store = open_store(task)
    for number in (1, 2):
        key = content_key("quantize", {"number": number}, {}, "1")
        folder = store.work_dir("quantize", key)
        (folder / "w.txt").write_text(str(number))
        write_manifest(folder, step="quantize", key=key, config={}, inputs={}, code_version="1", started_at=utc_now())
        register_model(task, "nvila", store.publish(folder), None, {})
    made = {"model": "models:/nvila@candidate", "version": "models:/nvila/1"}
    monkeypatch.setattr("nvila_pipelines.steps.verb.run_verb", lambda *_: made)
    names = dict(zip(("metrics", "report", "result"), shown, strict=True))
    version = quantize_model.python_func("m", "", "nvila", [], "job", "1", **names)
    set_alias(task, "nvila", "candidate", 2)
    assert move_alias(version, "champion") == "models:/nvila/1"
    assert resolve(task, "models:/nvila@champion").version == 1


def test_an_alias_of_nothing_is_refused(error: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        move_alias("models:/nobody@candidate", "champion")
    assert ended.value.code == 2
    assert "no model 'nobody' is registered" in said(error).message


def test_a_graph_runs_here_from_its_compiled_form(nvila: Nvila, model_folder: Path) -> None:
    words = ("endpoint=" + str(model_folder), "tasks=easy_vqa", 'options=["--limit", "4", "--threads", "1"]')
    done = nvila("pipeline", "run", "evaluate-endpoint", *words, "--json")
    assert done.code == 0, done.err
    tasks = Path(done.last_json["tasks"])
    assert "results.easy_vqa.exact_match,none" in (tasks / "evaluate-model" / "report").read_text()
    assert (tasks.parent / "pipeline.yaml").is_file()
    (outcome,) = Path("nvila-workspace").glob("runs/*/outcome.json")
    assert json.loads(outcome.read_text())["state"] == "SUCCEEDED"
    parent, task = runs_of(Settings.load(Path("nvila-workspace"), {}))
    assert parent.info.run_name == json.loads(outcome.read_text())["run_id"]
    assert parent.data.tags["nvila.outcome"] == "SUCCEEDED"
    assert task.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert task.data.params["arguments"].startswith(f"{model_folder} --tasks easy_vqa")
    assert "results.easy_vqa.exact_match_none" in task.data.metrics
    assert {run.info.status for run in (parent, task)} == {"FINISHED"}


@pytest.mark.slow
def test_a_task_that_fails_ends_the_run_with_its_error_and_what_was_shown_stays(nvila: Nvila) -> None:
    done = nvila("pipeline", "run", "evaluate-endpoint", "endpoint=/nowhere", "tasks=easy_vqa")
    assert done.code == 2
    assert "/nowhere" in done.err.splitlines()[-2]
    (outcome,) = Path("nvila-workspace").glob("runs/*/outcome.json")
    assert json.loads(outcome.read_text())["state"] == "FAILED"
    assert [run.info.status for run in runs_of(Settings.load(Path("nvila-workspace"), {}))] == ["FAILED", "FAILED"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("tune",), "'data' is missing"),
        (("lifecycle", "sed=1"), "no parameter 'sed'"),
        (("lifecycle", "recipe=fsat"), "unknown recipe 'fsat'"),
        (("train", "recipe=fast", "seed=many"), "seed"),
        (("lifecycle", "recipe=fast", "min_accuracy=1.5"), "gate.min_accuracy"),
        (("lifecycle", "--profile", "cluster.yaml"), "--profile places tasks in a cluster"),
    ],
    ids=["missing", "unknown", "recipe", "type", "range", "profile"],
)
def test_wrong_parameters_end_a_run_before_it_begins(nvila: Nvila, words: tuple[str, ...], says: str) -> None:
    done = nvila("pipeline", "run", *words)
    assert done.code == 2
    assert says in done.err
    assert not Path("nvila-workspace/runs").exists()
