"""The compiled pipeline: its golden form, its wiring against the table of steps, and what the gate holds back."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvila.errors import ConfigError
from nvila_pipelines.compile import GRAPHS, compile_graph, shipped
from nvila_pipelines.graphs.profile import TASKS, read_profile
from nvila_pipelines.steps.table import STEPS

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(shipped("lifecycle").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", GRAPHS)
def test_the_shipped_pipeline_is_what_the_graph_compiles_to(
    name: str, tmp_path: Path, golden: Callable[[str, str], None]
) -> None:
    text = compile_graph(name, tmp_path / "deeper" / f"{name}.yaml").read_text(encoding="utf-8")
    golden(os.path.relpath(shipped(name), GOLDEN), text)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_shipped_pipeline_loads_and_explains_its_parameters(name: str) -> None:
    from kfp import components

    loaded = components.load_component_from_file(str(shipped(name)))
    assert loaded.pipeline_spec.pipeline_info.name == f"nvila-{name}"
    for parameter in loaded.pipeline_spec.root.input_definitions.parameters.values():
        assert re.match("(WHAT|HOW|GATE|RESULT): ", parameter.description)


def test_an_unknown_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no graph 'lifecycles'") as caught:
        compile_graph("lifecycles", tmp_path / "x.yaml")
    assert "lifecycle" in caught.value.hint


PROFILE = """
defaults:
  env: {NVILA_STORE_URI: s3://models/nvila}
  secrets: {nvila-s3: {secret-key: NVILA_S3_SECRET_KEY}}
  retries: 3
  timeout_s: 600
tasks:
  train:
    cpu: "8"
    memory: 64Gi
    gpus: 2
    gpu_type: nvidia.com/gpu
    node_selector: {pool: h100}
    tolerations: [{key: spot, operator: Exists, effect: NoSchedule}]
    shm_gib: 16
    timeout_s: 86400
"""


def test_a_profile_places_tasks(tmp_path: Path) -> None:
    (tmp_path / "profile.yaml").write_text(PROFILE)
    file = compile_graph("lifecycle", tmp_path / "x.yaml", read_profile(tmp_path / "profile.yaml"))
    pipeline, platform = yaml.safe_load_all(file.read_text(encoding="utf-8"))
    executors = pipeline["deploymentSpec"]["executors"]
    train, data = executors["exec-train"]["container"], executors["exec-data"]["container"]
    assert train["resources"]["resourceCpuLimit"] == "8"
    assert train["resources"]["resourceMemoryLimit"] == "64Gi"
    assert train["resources"]["accelerator"].items() >= {"resourceCount": "2", "resourceType": "nvidia.com/gpu"}.items()
    assert "resources" not in data
    for one in (train, data):
        assert {entry["name"]: entry["value"] for entry in one["env"]} == {
            "NVILA_STORE_URI": "s3://models/nvila",
            "NVILA_TASK_RETRIES": "3",
        }
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert placed["exec-train"]["nodeSelector"] == {"labels": {"pool": "h100"}}
    assert placed["exec-train"]["tolerations"] == [{"effect": "NoSchedule", "key": "spot", "operator": "Exists"}]
    assert placed["exec-train"]["emptyDirMounts"][0]["sizeLimit"] == "16384Mi"
    assert placed["exec-train"]["activeDeadlineSeconds"] == "86400"
    assert placed["exec-data"]["activeDeadlineSeconds"] == "600"
    (secret,) = placed["exec-finish"]["secretAsEnv"]
    assert secret["secretName"] == "nvila-s3"
    assert secret["keyToEnv"] == [{"envVar": "NVILA_S3_SECRET_KEY", "secretKey": "secret-key"}]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("defaults: {cpus: 1}", "defaults.cpus"),
        ("defaults: {memory: 64 gigabytes}", "defaults.memory"),
        ("tasks: {trian: {cpu: '1'}}", "no task 'trian'"),
        ("tasks: {train: {gpus: -1}}", "tasks.train.gpus"),
        ("a: [", "cannot be read"),
    ],
    ids=["key", "quantity", "task", "range", "yaml"],
)
def test_a_wrong_profile_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "profile.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(says)):
        read_profile(tmp_path / "profile.yaml")


def test_every_task_of_every_graph_can_be_placed() -> None:
    found = set()
    for name in GRAPHS:
        spec = yaml.safe_load(shipped(name).read_text(encoding="utf-8"))
        found |= {executor.removeprefix("exec-") for executor in spec["deploymentSpec"]["executors"]}
    assert {re.sub("-[0-9]+$", "", executor) for executor in found} == set(TASKS)


def _tasks(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All tasks by the name of their step; those behind the condition too."""
    (condition,) = [name for name in spec["components"] if name.startswith("comp-condition")]
    found = {**_steps(spec), **spec["components"][condition]["dag"]["tasks"]}
    forms = {"evaluate": "evaluate-wide", "evaluate-2": "evaluate-quantized"}
    left_out = ("condition", "check")
    return {forms.get(name, name): task for name, task in found.items() if not name.startswith(left_out)}


def _steps(spec: dict[str, Any]) -> dict[str, Any]:
    """The tasks that the exit handler waits for."""
    (handler,) = [name for name in spec["components"] if name.startswith("comp-exit-handler")]
    found: dict[str, Any] = spec["components"][handler]["dag"]["tasks"]
    return found


def test_tasks_are_wired_as_the_table_says(spec: dict[str, Any]) -> None:
    tasks = _tasks(spec)
    assert set(tasks) == set(STEPS)
    tasks_of = {"evaluate": "evaluate-wide", "evaluate-2": "evaluate-quantized"}
    for name, step in STEPS.items():
        wired = {}
        for key, source in tasks[name].get("inputs", {}).get("artifacts", {}).items():
            if "taskOutputArtifact" in source:
                producer = source["taskOutputArtifact"]["producerTask"]
            else:
                # Handed through the condition: "pipelinechannel--<task>-<output>".
                producer = source["componentInputArtifact"].removeprefix("pipelinechannel--").rpartition("-")[0]
            wired[key] = tasks_of.get(producer, producer)
        assert wired == dict(step.inputs), name


def test_the_two_evaluations_have_models_of_two_steps(spec: dict[str, Any]) -> None:
    """From which the component knows the form."""
    for form, source in (("wide", "train"), ("quantized", "quantize")):
        model = _tasks(spec)[f"evaluate-{form}"]["inputs"]["artifacts"]["model"]
        assert model["taskOutputArtifact"]["producerTask"] == source


def test_register_and_serve_wait_for_the_gate(spec: dict[str, Any]) -> None:
    (condition,) = [task for name, task in _steps(spec).items() if name.startswith("condition")]
    assert "== true" in condition["triggerPolicy"]["condition"]
    assert {"register", "serve"} & set(_steps(spec)) == set()


@pytest.mark.parametrize("name", GRAPHS)
def test_the_end_is_recorded_whatever_happens(name: str) -> None:
    tasks = yaml.safe_load(shipped(name).read_text(encoding="utf-8"))["root"]["dag"]["tasks"]
    (handler,) = [task for task in tasks if task.startswith("exit-handler")]
    assert set(tasks) == {handler, "finish"}
    assert tasks["finish"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"


def _all_tasks(name: str) -> list[tuple[str, dict[str, Any]]]:
    spec = next(iter(yaml.safe_load_all(shipped(name).read_text(encoding="utf-8"))))
    components = [spec["root"], *spec["components"].values()]
    return [one for component in components for one in component.get("dag", {}).get("tasks", {}).items()]


@pytest.mark.parametrize("name", GRAPHS)
def test_no_task_takes_its_result_from_the_cache_of_kubeflow(name: str) -> None:
    """It knows neither our code, nor what data and aliases mean now, nor whether an artifact is still there."""
    cached = [task for task, spec in _all_tasks(name) if spec.get("cachingOptions", {}).get("enableCache")]
    # The handler and conditions are no tasks of ours: what is in them is.
    assert [task for task in cached if not task.startswith(("exit-handler", "condition"))] == []


@pytest.mark.parametrize("name", GRAPHS)
def test_what_kubeflow_fills_in_is_all_of_a_constant(name: str) -> None:
    """Its driver fills in a constant that is a placeholder, and none that holds one; kfp's local runner does both."""
    text = shipped(name).read_text(encoding="utf-8")
    constants = re.findall(r"constant: (.*\{\{\$\.pipeline_.*)", text)
    assert len(constants) == text.count("{{$.pipeline_") >= 4
    assert {one.strip("'\"") for one in constants} == {"{{$.pipeline_job_name}}", "{{$.pipeline_job_uuid}}"}


@pytest.mark.parametrize("name", GRAPHS)
def test_every_task_that_runs_a_verb_is_told_of_its_pipelines_run(name: str) -> None:
    verbs = {task: spec for task, spec in _all_tasks(name) if task.endswith("-model")}
    assert bool(verbs) == (name not in ("lifecycle", "train"))
    for task, given in verbs.items():
        assert "{{$.pipeline_job_name}}" in str(given["inputs"]["parameters"]["job"]), task
        assert "{{$.pipeline_job_uuid}}" in str(given["inputs"]["parameters"]["job_id"]), task
