"""The compiled pipeline: its golden form, its wiring against the table of steps, and what the gate holds back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvila_pipelines.compile import GRAPHS, compile_graph
from nvila_pipelines.steps.table import STEPS


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_graph("lifecycle", tmp_path_factory.mktemp("compiled") / "deeper" / "lifecycle.yaml")


@pytest.fixture(scope="module")
def spec(compiled: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(compiled.read_text(encoding="utf-8"))
    return found


def test_compiled_lifecycle_is_the_golden_one(compiled: Path, golden: Callable[[str, str], None]) -> None:
    text = re.sub(r"^sdkVersion: .*$", "sdkVersion: kfp-SCRUBBED", compiled.read_text(encoding="utf-8"), flags=re.M)
    text = re.sub(r"(image: ghcr\.io/\S+):\S+", r"\1:SCRUBBED", text)
    golden("pipelines/lifecycle.yaml", text)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_compiles_to_what_kfp_loads(name: str, tmp_path: Path) -> None:
    from kfp import components

    loaded = components.load_component_from_file(str(compile_graph(name, tmp_path / f"{name}.yaml")))
    assert loaded.pipeline_spec.pipeline_info.name == f"nvila-{name}"
    assert set(loaded.pipeline_spec.root.input_definitions.parameters) == {"recipe", "run_id"}


def _tasks(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All tasks by the name of their step; those behind the condition too."""
    (condition,) = [name for name in spec["components"] if name.startswith("comp-condition")]
    found = {**spec["root"]["dag"]["tasks"], **spec["components"][condition]["dag"]["tasks"]}
    forms = {"evaluate": "evaluate-wide", "evaluate-2": "evaluate-quantized"}
    return {forms.get(name, name): task for name, task in found.items() if not name.startswith("condition")}


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


def test_the_two_evaluations_have_their_forms(spec: dict[str, Any]) -> None:
    for form in ("wide", "quantized"):
        parameters = _tasks(spec)[f"evaluate-{form}"]["inputs"]["parameters"]
        assert parameters["form"]["runtimeValue"]["constant"] == form


def test_register_and_serve_wait_for_the_gate(spec: dict[str, Any]) -> None:
    (condition,) = [task for name, task in spec["root"]["dag"]["tasks"].items() if name.startswith("condition")]
    assert "== true" in condition["triggerPolicy"]["condition"]
    assert {"register", "serve"} & set(spec["root"]["dag"]["tasks"]) == set()
