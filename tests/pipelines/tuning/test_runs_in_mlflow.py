"""What a real MLflow server holds of `nvila tune` and `nvila quantize` that register a version."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.pipelines.conftest import Nvila

from nvila_platform.mlflow_backend import connect
from nvila_platform.mlflow_ui import start_ui
from nvila_platform.settings import Settings

QUICK = ("--method", "ln+lora", "--steps", 6, "--eval-every", 3, "--rank", 4, "--held-out", "0.2")


@pytest.fixture
def server(tracked: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings of a workspace whose runs and versions are kept by a server of its own."""
    with start_ui(tracked, port=0) as running:
        monkeypatch.setenv("NVILA_TRACKING_URI", running.url)
        yield replace(tracked, tracking_uri=running.url)


def runs_of(server: Settings) -> dict[str, Any]:
    client = connect(server)
    experiment = client.get_experiment_by_name(server.experiment)
    assert experiment is not None
    return {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}


def files_of(server: Settings, run_id: str, folder: str) -> set[str]:
    return {file.path for file in connect(server).list_artifacts(run_id, folder)}


@pytest.mark.slow
def test_versions_point_to_the_runs_that_made_them(nvila: Nvila, server: Settings, base: Path, pictures: Path) -> None:
    tuned = nvila("tune", base, pictures, *QUICK, "--json")
    assert tuned.code == 0, tuned.err
    found = tuned.last_json
    client = connect(server)
    version = client.get_model_version("nvila-tuned", "1")
    run = runs_of(server)[str(version.run_id)]
    assert run.info.status == "FINISHED"
    assert run.data.params["method_name"] == found["name"]
    assert run.data.params["steps"] == "6"
    assert run.data.metrics["held_out_loss"] == found["metrics"]["held_out_loss"]
    assert run.data.metrics["core_hours"] > 0
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert run.data.tags["nvila.digest"] == found["digest"] == version.tags["nvila.digest"]
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.name == f"{pictures} for training"
    assert f'"train": {found["samples"]["train"]}' in data.dataset.profile
    assert "report.html" in files_of(server, str(version.run_id), "")
    assert files_of(server, str(version.run_id), "model") == {"model/README.md", "model/MLmodel"}

    words = ("--language", "none", "--data", pictures, "--samples", 4, "--eval-samples", 4, "--budget", 100)
    small = nvila("quantize", "models:/nvila-tuned/1", *words, "--no-speed", "--register", "small", "--json")
    assert small.code == 0, small.err
    version = client.get_model_version("small", "1")
    run = runs_of(server)[str(version.run_id)]
    assert run.info.status == "FINISHED"
    assert run.data.params["quantize.vision"] == "w8a8"
    assert run.data.params["model"] == found["digest"]
    assert run.data.metrics["quantized_bytes"] < run.data.metrics["wide_bytes"]
    assert [one.dataset.name for one in run.inputs.dataset_inputs] == [f"{pictures} for calibration"]
    assert files_of(server, str(version.run_id), "model") == {"model/README.md", "model/MLmodel"}


@pytest.mark.slow
def test_work_that_is_found_again_has_a_run_where_it_becomes_a_version(
    nvila: Nvila, server: Settings, base: Path, pictures: Path
) -> None:
    first = nvila("tune", base, pictures, *QUICK, "--json")
    assert first.code == 0, first.err
    assert len(runs_of(server)) == 1
    same = nvila("tune", base, pictures, *QUICK, "--json").last_json
    assert same["reused"]
    assert same["model"] == first.last_json["model"]
    assert len(runs_of(server)) == 1, "nothing new, so nothing to tell"
    other = nvila("tune", base, pictures, *QUICK, "--name", "other", "--json").last_json
    assert other["reused"]
    version = connect(server).get_model_version("other", "1")
    run = runs_of(server)[str(version.run_id)]
    assert version.run_id != connect(server).get_model_version("nvila-tuned", "1").run_id
    assert run.data.metrics["held_out_loss"] == other["metrics"]["held_out_loss"]

    wide = nvila("quantize", base, "--language", "none", "--vision", "fp8", "--json")
    assert wide.code == 0, wide.err
    assert len(runs_of(server)) == 2, "what becomes no version has no run"
