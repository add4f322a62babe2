"""`nvila evaluate MODEL`: tables, files, interruption, several processes, wrong use; and the step of a recipe still."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.pipelines.conftest import Nvila

TASKS = "chartqa,pope,mmmu_val"
MINE = "{version: 1, title: T, fields: {question: q, answer: a}, prompt: '{question}', scorer: exact_match}"


def contents(outcome: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """Results without times, and the sample logs."""
    file = json.loads(Path(outcome["file"]).read_text())
    for name in ("date", "total_evaluation_time_seconds", "config"):
        del file[name]
    for config in file["configs"].values():
        del config["dataset_path"]
    return file, {name: Path(path).read_text() for name, path in outcome["samples"].items()}


def test_a_table_with_intervals_and_files(nvila: Nvila, model_folder: Path, tmp_path: Path) -> None:
    done = nvila("evaluate", model_folder, "--tasks", TASKS, "--fixture", "--out", "results", "--threads", "1")
    assert done.code == 0, done.err
    head, *lines, last = done.out.splitlines()
    assert head.split() == ["task", "metric", "value", "95%", "interval", "stderr", "samples"]
    assert any(line.startswith("chartqa") and "relaxed_overall" in line and " - " in line for line in lines)
    assert any(line.startswith("  human_test") for line in lines)
    file = Path(last.removeprefix("results: "))
    assert file.parent == tmp_path / "results" / "tiny"
    found = json.loads(file.read_text())
    assert set(found["results"]) == set(TASKS.split(","))
    assert found["config"]["random_seed"] == 0
    assert {"python", "torch", "transformers"} <= set(found["software"])
    assert len(found["model_digest"]) == 64
    logs = sorted(path.name.partition("_samples_")[2] for path in file.parent.glob("*.jsonl"))
    assert logs == ["chartqa.jsonl", "mmmu_val.jsonl", "pope.jsonl"]


def test_built_in_tasks_need_nothing(nvila: Nvila, model_folder: Path) -> None:
    done = nvila("evaluate", model_folder, "--limit", "5", "--json", "--threads", "1")
    assert done.code == 0, done.err
    results = done.last_json["results"]
    assert set(results) == {"easy_vqa", "digits_vqa", "digit_pages", "digit_clips", "digit_clips_when"}
    assert "exact_match,none" in results["digit_pages"]
    assert "miou,none" in results["digit_clips_when"]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(nvila: Nvila, model_folder: Path) -> None:
    words = ("evaluate", model_folder, "--tasks", "easy_vqa", "--limit", "13", "--batch-size", "4", "--json")
    one = nvila(*words, "--out", "one", "--threads", "1")
    two = nvila(*words, "--out", "two", "--threads", "1", "--processes", "2")
    assert (one.code, two.code) == (0, 0), two.err
    assert contents(one.last_json) == contents(two.last_json)
    answers = sorted(path.name for path in Path("two").glob("answers/*/answers-*.jsonl"))
    assert answers == ["answers-000.jsonl", "answers-001.jsonl"]


def test_an_interrupted_command_goes_on(nvila: Nvila, model_folder: Path) -> None:
    words = ("evaluate", model_folder, "--tasks", "easy_vqa", "--limit", "13", "--batch-size", "4", "--json")
    whole = nvila(*words, "--out", "whole", "--threads", "1")
    [file] = Path("whole").glob("answers/*/answers-000.jsonl")
    shutil.copytree("whole", "cut")
    kept = file.read_bytes()[: file.stat().st_size // 2]  # as a kill leaves it, in the middle of a line
    (cut := Path("cut") / file.relative_to("whole")).write_bytes(kept)
    resumed = nvila(*words, "--out", "cut", "--threads", "1")
    assert contents(resumed.last_json) == contents(whole.last_json)
    assert cut.read_bytes().startswith(kept)
    assert len(cut.read_bytes()) > len(kept)


def test_samples_without_a_score_are_reported(nvila: Nvila, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    rows = [{"q": f"is there a circle? {n}", "a": "yes"} for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"q": "x", "a": []}\n')
    words = ("evaluate", model_folder, "--tasks", "mine.yaml", "--data", "mine=rows.jsonl", "--threads", "1")
    done = nvila(*words, "--json")
    assert done.code == 0, done.err
    file = json.loads(Path(done.last_json["file"]).read_text())
    assert file["n-samples"] == {"mine": {"original": 10, "effective": 9}}
    assert "1 of 10 samples have no score" in done.err
    refused = nvila(*words, "--max-failed", "5%")
    assert refused.code == 1
    assert "1 of 10 samples of mine have no score" in refused.err
    assert "rows.jsonl:10" in refused.err


def test_a_task_without_a_result_costs_the_others_nothing(nvila: Nvila, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "x", "a": []}) + "\n")
    words = ("--data", "mine=rows.jsonl", "--limit", "3", "--threads", "1")
    done = nvila("evaluate", model_folder, "--tasks", "mine.yaml,easy_vqa", *words, "--json")
    assert done.code == 1
    assert set(done.last_json["results"]) == {"easy_vqa"}
    assert "1 of 1 samples of mine have no score" in done.last_json["unscored"]["mine"]
    assert "mine has no result" in done.err
    assert json.loads(Path(done.last_json["file"]).read_text())["unscored"].keys() == {"mine"}
    # A comparison cannot do without.
    compared = nvila("compare", model_folder, model_folder, "--tasks", "mine.yaml,easy_vqa", *words)
    assert compared.code == 1
    assert "samples of mine have no score" in compared.err


def test_a_task_that_does_not_fit_into_the_context_is_skipped(nvila: Nvila, short_model_folder: Path) -> None:
    words = ("evaluate", short_model_folder, "--limit", "3", "--threads", "1", "--tasks")
    done = nvila(*words, "easy_vqa,digit_clips")
    assert done.code == 0, done.err
    *_, skipped, results = done.out.splitlines()
    assert skipped.startswith("digit_clips  skipped: the prompt has ")
    assert "context 48 (sample fewer frames with --frames" in skipped
    file = json.loads(Path(results.removeprefix("results: ")).read_text())
    assert file["skipped"].keys() == {"digit_clips"}
    assert file["unscored"] == {}
    # What was not answered is known from the log, too.
    assert nvila(*words, "easy_vqa,digit_clips", "--processes", "2", "--json").last_json["skipped"] == file["skipped"]
    assert nvila(*words, "easy_vqa,digit_clips", "--strict").code == 1
    # Fewer frames fit, and are asked.
    fewer = nvila(*words, "easy_vqa,digit_clips", "--frames", "3", "--json")
    assert fewer.code == 0, fewer.err
    assert set(fewer.last_json["results"]) == {"easy_vqa", "digit_clips"}
    # A task alone, or nothing but such tasks, is no result.
    for tasks in ("digit_clips", "digit_clips,digit_clips_when"):
        alone = nvila(*words, tasks)
        assert (alone.code, "context 48" in alone.err) == (1, True)


def test_a_comparison_leaves_out_what_does_not_fit_and_a_gate_refuses(
    nvila: Nvila, model_folder: Path, short_model_folder: Path, tmp_path: Path
) -> None:
    words = ("--limit", "3", "--threads", "1")
    done = nvila("compare", model_folder, short_model_folder, "--tasks", "easy_vqa,digit_clips", *words)
    assert done.code == 0, done.err
    assert "digit_clips: not compared, B skipped it: the prompt has" in done.out
    (tmp_path / "policy.yaml").write_text("tasks: {easy_vqa: {min_score: 0}, digit_clips: {min_score: 0}}\n")
    refused = nvila("gate", short_model_folder, "--policy", "policy.yaml", *words)
    assert refused.code == 1
    assert "digit_clips cannot be asked" in refused.err


def test_answers_of_another_version_are_not_used(nvila: Nvila, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "is there a circle?", "a": "yes"}\n')
    for version in (1, 2):
        (tmp_path / "mine.yaml").write_text(MINE.replace("version: 1", f"version: {version}"))
        done = nvila("evaluate", model_folder, "--tasks", "mine.yaml", "--data", "mine=rows.jsonl", "--threads", "1")
        assert done.code == 0, done.err
    assert "answers to mine version 1 are not used for version 2" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "chartqua", "--fixture"], "did you mean 'chartqa'?"),
        (["--tasks", "chartqa"], "--data chartqa=FOLDER"),
        (["--tasks", "chartqa@2", "--fixture"], "of version 1, not 2"),
        (["--tasks", "chartqa", "--data", "chartqa"], "names no place"),
        (["--tasks", "chartqa", "--data", "pope=x"], "which is not among the tasks"),
        (["--tasks", "pope", "--data", "pope=x", "--data", "pope=y"], "twice"),
        (["--tasks", "chartqa", "--fixture", "--model", "wide"], "--model is about a recipe"),
        (["--tasks", "chartqa", "--fixture", "--fast"], "--fast is about a recipe"),
        (["--tasks", "chartqa", "--fixture", "other"], "two models are named"),
        (["--tasks", "chartqa", "--batch-size", "0"], "no positive whole number"),
        (["--max-failed", "2"], "is no share"),
    ],
)
def test_wrong_use(nvila: Nvila, model_folder: Path, words: list[str], message: str) -> None:
    done = nvila("evaluate", model_folder, *words)
    assert done.code == 2
    assert message in done.err


def test_no_model(nvila: Nvila) -> None:
    done = nvila("evaluate", "--tasks", "chartqa")
    assert (done.code, "no model is named" in done.err) == (2, True)
    done = nvila("evaluate", "nowhere", "--tasks", "chartqa")
    assert (done.code, "does not exist" in done.err) == (2, True)


def test_the_list_of_tasks(nvila: Nvila) -> None:
    done = nvila("evaluate", "--list-tasks")
    assert any(line.startswith("chartqa ") and "v1" in line for line in done.out.splitlines())
    found = nvila("evaluate", "--list-tasks", "--json").last_json
    assert found["pope"]["version"] == 1


def test_a_recipe_is_still_a_recipe(nvila: Nvila, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run_to(step: str, *rest: object) -> int:
        asked.append(step)
        return 0

    monkeypatch.setattr("nvila_pipelines.cli.evaluate.run_to", run_to)
    assert nvila("evaluate").code == 0
    assert nvila("evaluate", "fast", "seed=1", "--model", "wide").code == 0
    assert asked == ["evaluate-quantized", "evaluate-wide"]
