"""The Kubeflow components: their form, file by file, and what their bodies do."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.pipelines.conftest import Result

import nvila
from nvila.errors import DataError, InfrastructureError, NvilaError
from nvila_pipelines import components
from nvila_pipelines.components.image import IMAGE
from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.check import check_run
from nvila_pipelines.steps.component import run_component, run_evaluation, run_task
from nvila_pipelines.steps.context import StepContext
from nvila_pipelines.steps.finish import finish_run
from nvila_pipelines.steps.pipeline_job import PipelineJob, run_name
from nvila_pipelines.steps.table import STEPS, StepSpec
from nvila_platform.launch.outcome import left_error
from nvila_platform.settings import Settings, runner_pid
from nvila_platform.store import ArtifactRef

FOLDER = Path(components.__file__).parent
ALL = sorted(path for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "image"))
AROUND = {"check", "finish"}
VERBS = {"tune_model", "quantize_model", "evaluate_model", "gate_model", "deploy_model", "promote"}
FILES = [path for path in ALL if path.stem not in AROUND | VERBS]
OTHERS = {"recipe", "run_id", "result", "confusion", "size", "metrics", "report"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def function(path: Path) -> ast.FunctionDef:
    (found,) = [node for node in parsed(path).body if isinstance(node, ast.FunctionDef)]
    return found


def test_every_step_has_a_component() -> None:
    assert {spec.module for spec in STEPS.values()} == {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_form_of_a_component_file(path: Path) -> None:
    imports = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom)]
    # kfp reads the annotations when the file is imported.
    assert not [node for node in imports if node.module == "__future__"]
    made = function(path)
    assert made.name == path.stem
    names = [argument.arg for argument in made.args.args]
    assert 2 <= len(names) <= 8
    assert names[:2] == ["recipe", "run_id"]
    assert names[-3:] == ["metrics", "report", "result"]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_component_file_holds_one_documented_component(path: Path) -> None:
    made = function(path)
    assert made.name == path.stem
    # A verb's words, name and id of the run that it belongs to, and three artifacts.
    assert len(made.args.args) <= 10
    (decorator,) = made.decorator_list
    assert isinstance(decorator, ast.Call)
    assert ast.unparse(decorator) == "dsl.component(base_image=IMAGE, install_kfp_package=False)"
    assert ast.get_docstring(made)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_component_takes_the_inputs_of_its_step(path: Path) -> None:
    names = {argument.arg for argument in function(path).args.args} - OTHERS
    for spec in STEPS.values():
        if spec.module == path.stem:
            assert names == set(spec.inputs)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_component_is_built_on_the_pinned_image(path: Path) -> None:
    made = getattr(importlib.import_module(f"nvila_pipelines.components.{path.stem}"), path.stem)
    assert made.component_spec.implementation.container.image == IMAGE


def test_the_image_is_pinned_to_the_version() -> None:
    name, _, tag = IMAGE.rpartition(":")
    assert tag == nvila.__version__
    # kfp's local runner warns about images whose name does not say that they hold Python.
    assert "python" in name


class Confusion(Result):
    def log_confusion_matrix(self, categories: list[str], matrix: list[list[int]]) -> None:
        self.metadata["confusionMatrix"] = (categories, matrix)


@pytest.mark.parametrize(("source", "step"), [("train", "evaluate-wide"), ("quantize", "evaluate-quantized")])
def test_the_form_of_an_evaluation_follows_from_its_model(
    task: Settings, micro: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, step: str
) -> None:
    def answer(context: StepContext) -> dict[str, float]:
        lines = [("yes", "yes"), ("no", "yes"), ("no", "nonsense")]
        said = [{"answer": right, "prediction": given, "correct": right == given} for right, given in lines]
        text = "".join(json.dumps(one) + "\n" for one in said)
        (context.out_dir / "predictions.jsonl").write_text(text, encoding="utf-8")
        return {"accuracy": 1 / 3}

    monkeypatch.setattr(StepSpec, "load", lambda self: work)
    results = {name: Result(tmp_path / name) for name in ("data", source)}
    shown = Result(tmp_path / "metrics"), Result(tmp_path / "report")
    for name in results:
        run_component(name, micro.to_json(), "run-1", {}, results[name], *shown)
    monkeypatch.setattr(StepSpec, "load", lambda self: answer)
    confusion, scored = Confusion(tmp_path / "confusion"), Result(tmp_path / "scores")
    inputs = {"data": results["data"].path, "model": results[source].path}
    run_evaluation(micro.to_json(), "run-1", inputs, scored, *shown, confusion)
    assert ArtifactRef.from_json(Path(scored.path).read_text()).step == step
    expected = (["no", "yes", "(other)"], [[0, 1, 1], [0, 1, 0], [0, 0, 0]])
    assert confusion.metadata["confusionMatrix"] == expected
    assert json.loads(Path(confusion.path).read_text()) == dict(zip(("categories", "matrix"), expected, strict=True))


def work(context: StepContext) -> dict[str, float]:
    (context.out_dir / "out.txt").write_text(" ".join(sorted(context.inputs)), encoding="utf-8")
    return {}


def test_references_go_in_and_out(
    task: Settings, micro: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepSpec, "load", lambda self: work)
    data, curated = Result(tmp_path / "a" / "data"), Result(tmp_path / "b" / "curated")
    shown = Result(tmp_path / "c" / "metrics"), Result(tmp_path / "c" / "report")
    run_component("data", micro.to_json(), "run-1", {}, data, *shown)
    assert json.loads(Path(shown[0].path).read_text()) == shown[0].metadata
    assert "core_hours" in shown[0].metadata
    assert "| core_hours |" in Path(shown[1].path).read_text()
    directory = run_component("curate", micro.to_json(), "run-1", {"data": data.path}, curated, *shown)
    ref = ArtifactRef.from_json(Path(curated.path).read_text(encoding="utf-8"))
    assert ref.step == "curate"
    assert curated.metadata == json.loads(ref.to_json())
    assert directory == Path(task.store_uri) / "curate" / ref.key[:16]
    assert (directory / "out.txt").read_text(encoding="utf-8") == "data"
    # A report that cannot be drawn says so.
    assert "There is no report of the step curate" in Path(shown[1].path).read_text()


def test_what_only_an_outage_stopped_is_tried_again_as_often_as_the_profile_says(
    task: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("nvila_pipelines.steps.component.time.sleep", waited.append)
    monkeypatch.setenv("NVILA_TASK_RETRIES", "3")
    raised: list[NvilaError] = [InfrastructureError("away"), InfrastructureError("away")]

    def flaky(_: Settings) -> str:
        if raised:
            raise raised.pop()
        return "done"

    assert run_task("data", "run-1", flaky) == "done"
    assert waited == [10, 20]
    raised = [InfrastructureError("away")] * 4
    with pytest.raises(SystemExit) as stopped:
        run_task("data", "run-1", flaky)
    assert stopped.value.code == 75
    raised, waited[:] = [DataError("broken"), DataError("never seen")], []
    with pytest.raises(SystemExit) as stopped:
        run_task("data", "run-1", flaky)
    assert (stopped.value.code, waited, len(raised)) == (1, [], 1)


def test_parameters_are_checked_before_anything_is_done(
    task: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = PipelineJob(name="nvila lifecycle", id="0123456789-abc")
    checked = check_run("fast", ["train.precision=bf16"], {"seed": "7", "gate.min_accuracy": ""}, job)
    found = Recipe.from_json(checked.recipe)
    assert (found.seed, found.train.precision, checked.run_id) == (7, "bf16", "nvila-lifecycle-01234567")
    assert (
        check_run(checked.recipe, ["seed=8"], {}, job, "x").recipe
        == check_run("fast", ["train.precision=bf16", "seed=8"], {}, job, "x").recipe
    )
    error_file = tmp_path / "error.json"
    for fields, says in (({"gate.min_accuracy": "1.5"}, "gate.min_accuracy"), ({"seed": "many"}, "seed")):
        error_file.unlink(missing_ok=True)
        monkeypatch.setenv("NVILA_ERROR_FILE", str(error_file))
        with pytest.raises(SystemExit) as stopped:
            check_run("fast", [], fields, job, "x")
        assert stopped.value.code == 2
        left = left_error(error_file)
        assert left is not None
        assert says in left[0].message


@pytest.mark.parametrize(
    ("name", "id", "run_id", "expected"),
    [
        ("nvila-tune", "0123456789", "", "nvila-tune-01234567"),
        ("my run / 2", "ab-cd", "", "my-run-2-ab-cd"),
        ("nvila-tune", "0123456789", "Nightly run", "Nightly-run"),
        ("nvila-tune", "", "", "nvila-tune"),
        ("", "", "", ""),
    ],
    ids=["job", "unsafe", "given", "no-id", "nothing"],
)
def test_runs_of_one_name_are_told_by_their_id(name: str, id: str, run_id: str, expected: str) -> None:
    assert run_name(PipelineJob(name=name, id=id), run_id) == expected


@pytest.mark.parametrize(
    ("state", "recorded"),
    [
        *((state, "SUCCEEDED") for state in ("SUCCEEDED", "COMPLETE", "CACHED")),
        *((state, "CANCELLED") for state in ("CANCELLED", "CANCELED", "CANCELING")),
        *((state, "FAILED") for state in ("FAILED", "UNKNOWN", "")),
    ],
)
def test_every_word_of_kubeflow_for_an_end_is_understood(task: Settings, state: str, recorded: str) -> None:
    finish_run("run-1", state, "")
    assert json.loads((task.workspace / "runs" / "run-1" / "outcome.json").read_text())["state"] == recorded


def test_the_end_of_a_run_is_recorded(task: Settings) -> None:
    finish_run("run-1", "FAILED", "the step train failed", followed=True)
    outcome = json.loads((task.workspace / "runs" / "run-1" / "outcome.json").read_text())
    assert (outcome["state"], outcome["message"]) == ("FAILED", "the step train failed")


@pytest.mark.parametrize(("state", "asked"), [("FAILED", ["run-1"]), ("CANCELED", ["run-1"]), ("SUCCEEDED", [])])
def test_the_end_of_a_run_that_did_not_succeed_takes_its_jobs_away(
    task: Settings, monkeypatch: pytest.MonkeyPatch, state: str, asked: list[str]
) -> None:
    seen: list[str] = []

    def end_jobs(workspace: Path, run_id: str) -> list[str]:
        assert workspace == task.workspace
        seen.append(run_id)
        return ["job x was left"]

    monkeypatch.setattr("nvila_platform.launch.job_notes.end_jobs", end_jobs)
    finish_run("run-1", state, "")
    assert seen == asked


def test_a_typed_error_is_left_for_the_run(
    task: Settings, micro: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(context: StepContext) -> dict[str, float]:
        raise DataError("line 3 is broken", "mend it")

    error_file = tmp_path / "error.json"
    monkeypatch.setenv("NVILA_ERROR_FILE", str(error_file))
    monkeypatch.setattr(StepSpec, "load", lambda self: fails)
    result = Result(tmp_path / "data")
    with pytest.raises(SystemExit) as stopped:
        run_component("data", micro.to_json(), "run-1", {}, result, result, result)
    assert stopped.value.code == 1
    left = left_error(error_file)
    assert left is not None
    assert isinstance(left[0], DataError)
    assert (left[0].message, left[0].hint) == ("line 3 is broken", "mend it")
    assert not Path(result.path).exists()
    assert "DataError: line 3 is broken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "reference", "code", "message"),
    [("{}", None, 2, "recipe field name is missing"), (None, "nonsense", 1, "not an artifact reference")],
    ids=["recipe", "reference"],
)
def test_unusable_arguments_are_left_as_typed_errors_too(
    recipe: str | None,
    reference: str | None,
    code: int,
    message: str,
    task: Settings,
    micro: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error_file = tmp_path / "error.json"
    monkeypatch.setenv("NVILA_ERROR_FILE", str(error_file))
    inputs = {}
    if reference is not None:
        (tmp_path / "ref").write_text(reference, encoding="utf-8")
        inputs["data"] = str(tmp_path / "ref")
    with pytest.raises(SystemExit) as stopped:
        run_component("curate", recipe or micro.to_json(), "run-1", inputs, *[Result(tmp_path / "result")] * 3)
    assert stopped.value.code == code
    left = left_error(error_file)
    assert left is not None
    assert message in left[0].message


_TASK = """
import sys, time
from nvila_platform.launch.child import die_with
die_with(int(sys.argv[1]))
print("ready", flush=True)
time.sleep(60)
"""


def test_a_task_ends_with_the_run_although_a_shell_is_between() -> None:
    run = subprocess.Popen(["sleep", "60"])
    task = subprocess.Popen(
        ["sh", "-c", f"{sys.executable} -c '{_TASK}' {run.pid}\n"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert task.stdout is not None
        assert task.stdout.readline() == "ready\n"
        assert task.poll() is None
        run.kill()
        run.wait()
        began = time.monotonic()
        assert task.wait(20) != 0
        assert time.monotonic() - began < 10
    finally:
        run.kill()
        task.kill()
        task.communicate()


def test_a_task_whose_run_is_gone_ends_at_once() -> None:
    run = subprocess.Popen(["true"])
    run.wait()
    done = subprocess.run([sys.executable, "-c", _TASK, str(run.pid)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"the process {run.pid} is gone" in done.stderr
    assert "ready" not in done.stdout


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({}, None), ({"NVILA_RUNNER_PID": ""}, None), ({"NVILA_RUNNER_PID": "-1"}, None), ({"NVILA_RUNNER_PID": "7"}, 7)],
    ids=["in-a-pod", "empty", "no-process-id", "local"],
)
def test_the_run_of_a_task_is_known_on_this_machine_only(environ: dict[str, str], expected: int | None) -> None:
    assert runner_pid(environ) == expected
