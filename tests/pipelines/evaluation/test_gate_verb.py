"""`nvila gate`: verdict, exit code, tags of the registry, the live model, and wrong use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nvila_pipelines.evaluation.gate import gate_tags, time_answers
from nvila_platform.artifacts import content_key, utc_now, write_manifest
from nvila_platform.registration import register_model
from nvila_platform.registry import ModelVersion, resolve, set_alias, version_tags
from nvila_platform.settings import Settings
from nvila_platform.store import open_store

if TYPE_CHECKING:
    from tests.pipelines.conftest import Nvila

EASY = "{tasks: {easy_vqa: {min_score: 0.0}}, latency: {p95_ms: 600000, questions: 2}, size: {max_mib: 100}}"
QUICK = ("--limit", "8", "--threads", "1")


def policy(text: str) -> Path:
    Path("policy.yaml").write_text(text)
    return Path("policy.yaml")


@pytest.fixture
def registered(model_folder: Path, tmp_path: Path, settings: Settings) -> ModelVersion:
    """The tiny model as version 1 of `tiny`."""
    import shutil

    store, key = open_store(settings), content_key("quantize", {}, {}, "1")
    directory = store.work_dir("quantize", key)
    shutil.copytree(model_folder, directory / "model")
    write_manifest(directory, step="quantize", key=key, config={}, inputs={}, code_version="1", started_at=utc_now())
    return register_model(settings, "tiny", store.publish(directory), None, {})


def test_a_model_that_passes(nvila: Nvila, model_folder: Path) -> None:
    done = nvila("gate", model_folder, "--policy", policy(EASY), *QUICK)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0].split() == ["check", "value", "limit"]
    assert "latency p95_ms" in done.out
    file = Path(done.out.splitlines()[-1].removeprefix("verdict: "))
    verdict = json.loads(file.read_text())
    assert verdict["passed"]
    assert Path(verdict["results"]).is_file()
    assert len(verdict["checks"]) == 5


def test_a_refused_model_ends_with_one_and_the_reason(nvila: Nvila, model_folder: Path) -> None:
    done = nvila("gate", model_folder, "--policy", policy("{tasks: {easy_vqa: {}}, min_samples: 9}"), *QUICK, "--json")
    assert done.code == 1
    assert done.last_json["reason"] == "easy_vqa samples is 8.0000, the limit is 9.0000"
    assert "error: the gate refused the model: easy_vqa samples is 8.0000" in done.err
    assert not json.loads(Path(done.last_json["file"]).read_text())["passed"]


def test_the_version_is_tagged_and_compared_with_the_live_one(
    nvila: Nvila, registered: ModelVersion, settings: Settings
) -> None:
    where = ("--workspace", settings.workspace)
    file = policy("{against: 'models:/tiny@champion', max_drop: 0.0, tasks: {easy_vqa: {}}, size: {max_ratio: 1.0}}")
    first = nvila("gate", "models:/tiny/1", "--policy", file, *QUICK, *where, "--json")
    assert (first.code, first.last_json["against"]) == (0, None), first.err
    assert version_tags(settings, registered)["nvila.gate.state"] == "passed"
    set_alias(settings, "tiny", "champion", 1)
    second = nvila("gate", "models:/tiny/1", "--policy", file, *QUICK, *where, "--json")
    assert (second.code, second.last_json["against"]) == (0, "models:/tiny@champion"), second.err
    drop = next(check for check in second.last_json["checks"] if check["name"] == "easy_vqa drop")
    assert drop["value"] == 0.0
    refused = nvila(
        "gate", "models:/tiny/1", "--policy", policy("{tasks: {easy_vqa: {min_score: 1.1}}}"), *QUICK, *where
    )
    assert refused.code == 1
    tags = version_tags(settings, resolve(settings, "models:/tiny@champion"))
    assert tags["nvila.gate.state"] == "refused"
    assert tags["nvila.gate.reason"].startswith("easy_vqa exact_match is ")
    assert tags["nvila.digest"] == registered.digest


def test_a_task_of_ones_own_stands_beside_the_policy(nvila: Nvila, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine.yaml").write_text(
        "{version: 1, title: T, fields: {question: q, answer: a}, prompt: '{question}', scorer: exact_match}"
    )
    (tmp_path / "rows.jsonl").write_text('{"q": "is there a circle?", "a": "yes"}\n')
    (tmp_path / "p" / "policy.yaml").write_text("{tasks: {mine: {}}, latency: {p50_ms: 600000}}")
    done = nvila("gate", model_folder, "--policy", "p/policy.yaml", "--data", "mine=rows.jsonl", "--threads", "1")
    assert done.code == 0, done.err
    assert "of 1 answers, one by one" in done.out


@pytest.mark.parametrize(
    ("words", "text", "message"),
    [
        ([], EASY, "0 models are named"),
        (["m", "n"], EASY, "2 models are named"),
        (["m"], None, "no policy is named"),
        (["m", "--tasks", "pope"], EASY, "--tasks names tasks, but the policy does"),
        (["m"], "{tasks: {easy_vqa: {min_scor: 1}}}", "did you mean 'min_score'"),
        (["m"], "{max_drop: 0, tasks: {easy_vqa: {}}}", "names no live model"),
        (["m", "--against", "models:tiny"], "{max_drop: 0, tasks: {easy_vqa: {}}}", "model folder m does not exist"),
        (["m", "--against", "models:/a@b@c"], "{max_drop: 0, tasks: {easy_vqa: {}}}", "is no model address"),
    ],
)
def test_wrong_use(nvila: Nvila, words: list[str], text: str | None, message: str) -> None:
    given = [] if text is None else ["--policy", policy(text)]
    done = nvila("gate", *words, *given)
    assert (done.code, message in done.err) == (2, True), done.err


def test_a_policy_that_is_not_there(nvila: Nvila) -> None:
    done = nvila("gate", "m", "--policy", "nowhere.yaml")
    assert (done.code, "the policy nowhere.yaml cannot be read" in done.err) == (2, True)


def test_the_first_answer_is_not_timed() -> None:
    asked: list[str] = []

    class Fake:
        def answer(self, questions: list[str], settings: object) -> list[str]:
            asked.extend(questions)
            return ["x"]

    assert len(time_answers(Fake(), ["a", "b", "c"], None)) == 2  # type: ignore[arg-type]
    assert asked == ["a", "b", "c"]
    assert len(time_answers(Fake(), ["a"], None)) == 1  # type: ignore[arg-type]


def test_a_long_reason_fits_a_tag() -> None:
    tags = gate_tags({"passed": False, "reason": "x" * 9000})
    assert (tags["nvila.gate.state"], len(tags["nvila.gate.reason"])) == ("refused", 1000)
