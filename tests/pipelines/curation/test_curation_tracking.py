"""Curation in MLflow: the numbers, the report and the plots; and no MLflow is no reason to fail."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from nvila_pipelines.curation.finishing import track
from nvila_platform.settings import Settings


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "likelihoods.svg").write_text("<svg/>", encoding="utf-8")
    (folder / "report.html").write_text("<html/>", encoding="utf-8")
    return folder


@pytest.mark.slow
def test_a_run_holds_numbers_report_and_plots(out: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    settings = Settings.load(tmp_path / "ws", {})
    track(settings, out, {"normalize": "token"}, {"records": 9.0, "kept": 4.0})
    client = MlflowClient(settings.tracking_uri)
    (experiment,) = client.search_experiments(filter_string="name = 'nvila'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics == {"records": 9.0, "kept": 4.0}
    assert run.data.params == {"normalize": "token"}
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"report.html", "plots"}


def test_an_outage_leaves_the_run_in_the_workspace(out: Path, tmp_path: Path) -> None:
    with socket.socket() as unused:  # bound but never listening: nobody answers
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        settings = Settings.load(tmp_path / "ws", {"NVILA_TRACKING_URI": address})
        track(settings, out, {"normalize": "none"}, {"records": 9.0})
    (kept,) = (tmp_path / "ws" / "tracking-buffer").glob("*.jsonl")
    kinds = [json.loads(line).get("kind") for line in kept.read_text(encoding="utf-8").splitlines()]
    assert {"params", "metrics", "artifact"} <= set(kinds)
