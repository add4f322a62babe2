"""Every compiled graph, run from its YAML on this machine, and what its tasks leave for the Kubeflow UI.

The micro recipe learns nothing, but every task really works.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila_platform.mlflow_backend import connect
from nvila_platform.registry import aliases_of, resolve, version_tags
from nvila_platform.settings import Settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MICRO = Path(__file__).resolve().parents[1] / "fixtures" / "micro.yaml"
QUICK = json.dumps(["--steps", "4", "--eval-every", "2", "--rank", "4", "--held-out", "0.2"])
FEW = json.dumps(["--limit", "20"])


@pytest.fixture(scope="module")
def home(make_workspace: Callable[[], Any]) -> Any:
    """A workspace in which the lifecycle has registered `nvila@champion`, a quantized model."""
    workspace = make_workspace()
    words = (f"recipe={MICRO}", 'overrides=["register.alias=champion"]', "register_as=nvila")
    workspace.lifecycle = workspace.graph("lifecycle", *words).json
    return workspace


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    (folder / "images").mkdir()
    lines = []
    for number in range(30):
        colour = ("red", "green", "blue")[number % 3]
        Image.new("RGB", (40, 32), colour).save(folder / "images" / f"{number}.png")
        line = {"image": f"images/{number}.png", "question": "what color is the shape?", "answer": colour}
        lines.append(json.dumps(line))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def tuned(home: Any, pictures: Path) -> Any:
    return home.graph("tune", f"data={pictures}", f"options={QUICK}").json


def settings_of(home: Any) -> Settings:
    return Settings.load(home.path, {})


def artifact(said: dict[str, Any], task: str, name: str) -> str:
    return (Path(said["tasks"]) / task / name).read_text(encoding="utf-8")


def outcomes(home: Any) -> set[str]:
    return {json.loads(path.read_text())["state"] for path in home.path.glob("runs/*/outcome.json")}


def test_every_task_of_the_lifecycle_leaves_what_the_ui_shows(home: Any) -> None:
    said = home.lifecycle
    tasks = {path.name for path in Path(said["tasks"]).iterdir()}
    steps = {"data", "curate", "train", "quantize", "evaluate", "evaluate-2", "gate", "register", "serve"}
    assert tasks == steps | {"check", "finish"}
    for step in steps:
        assert json.loads(artifact(said, step, "metrics")), step
        assert len(artifact(said, step, "report")) > 40, step
        assert json.loads(artifact(said, step, "result"))["digest"], step
        assert "There is no report" not in artifact(said, step, "report"), step
    assert artifact(said, "train", "report").count("<svg") >= 4  # a loss curve a stage
    assert "<svg" in artifact(said, "curate", "report")
    assert "| **all** |" in artifact(said, "evaluate", "report")
    assert "lets the model through" in artifact(said, "gate", "report")
    assert "| part | wide | quantized | left |" in artifact(said, "quantize", "report")
    for task in ("evaluate", "evaluate-2"):
        confusion = json.loads(artifact(said, task, "confusion"))
        assert sum(map(sum, confusion["matrix"])) == json.loads(artifact(said, "data", "metrics"))["test"]
        output = json.loads(artifact(said, task, "executor_output.json"))["artifacts"]["confusion"]["artifacts"][0]
        assert len(output["metadata"]["confusionMatrix"]["rows"]) == len(confusion["categories"])
    assert outcomes(home) == {"SUCCEEDED"}


def test_mlflow_names_the_data_and_the_load_of_the_machine(home: Any) -> None:
    client = connect(settings_of(home))
    experiment = client.get_experiment_by_name("nvila")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    data = runs[home.lifecycle["run_id"]].inputs
    assert data is not None
    inputs = {one.dataset.name for one in data.dataset_inputs}
    assert {"data for training", "curate for training", "data for evaluation"} <= inputs
    assert "system/cpu_utilization_percentage" in runs[home.lifecycle["run_id"]].data.metrics
    version = client.get_model_version("nvila", "1")
    assert "## Inputs and outputs" in str(version.description)


def test_train_reuses_the_work_of_the_lifecycle(home: Any) -> None:
    words = (f"recipe={MICRO}", 'overrides=["register.alias=champion"]')
    said = home.graph("train", *words).json
    phases = home.phases(said["run_id"])
    assert {phases[step] for step in ("data", "curate", "train", "evaluate-wide")} == {"reused"}
    assert "confusion" in {path.name for path in (Path(said["tasks"]) / "evaluate").iterdir()}


def test_tune_takes_the_wide_weights_behind_the_champion_and_registers(home: Any, tuned: Any) -> None:
    settings = settings_of(home)
    result = json.loads(artifact(tuned, "tune-model", "result"))
    assert result["model"] == "models:/nvila-tuned/1"
    version = resolve(settings, "models:/nvila-tuned@candidate")
    assert version.digest == result["digest"]
    assert version_tags(settings, version)["nvila.lineage.train"] == home.digest("train")
    assert "metrics.held_out_loss" in artifact(tuned, "tune-model", "report")


def test_quantize_and_release_moves_the_alias_to_what_passes(home: Any, tuned: Any) -> None:
    policy = "policy=tasks: {easy_vqa: {min_score: 0.0}}"
    said = home.graph("quantize-and-release", policy, f"gate_options={FEW}", 'quantize_options=["--no-speed"]').json
    assert "passed" in artifact(said, "gate-model", "report")
    settings = settings_of(home)
    champion = resolve(settings, "models:/nvila@champion")
    assert champion.version == 2
    assert aliases_of(settings, champion) == ["candidate", "champion"]
    assert resolve(settings, "models:/nvila@previous").version == 1


def test_what_the_gate_refuses_is_not_released(home: Any, tuned: Any) -> None:
    policy = "policy=tasks: {easy_vqa: {min_score: 1.0}}"
    words = ("register_as=refused", f"gate_options={FEW}", 'quantize_options=["--no-speed"]')
    said = home.graph("quantize-and-release", policy, *words).json
    assert "**refused**" in artifact(said, "gate-model", "report")
    assert aliases_of(settings_of(home), resolve(settings_of(home), "models:/refused/1")) == ["candidate"]
    assert "promote" not in {path.name for path in Path(said["tasks"]).iterdir()}


def test_evaluate_endpoint_measures_what_an_alias_means(home: Any) -> None:
    said = home.graph("evaluate-endpoint", "endpoint=models:/nvila@champion", "tasks=easy_vqa", f"options={FEW}").json
    assert "results.easy_vqa.exact_match,none" in artifact(said, "evaluate-model", "report")
    assert json.loads(artifact(said, "evaluate-model", "result"))["results"]["easy_vqa"]
