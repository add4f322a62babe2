"""The lifecycle with the services that a cluster has: a real MLflow server, and a real S3 server as the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nvila_pipelines.steps.table import STEPS
from nvila_platform.mlflow_ui import UiServer, start_ui
from nvila_platform.settings import Settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UiServer]:
    with start_ui(Settings.load(tmp_path_factory.mktemp("mlflow"), {}), port=0) as server:
        yield server


def test_a_run_is_in_both_and_its_version_can_be_fetched_elsewhere(
    make_workspace: Callable[[], Any], s3: Any, mlflow_server: UiServer
) -> None:
    from mlflow import MlflowClient

    variables = {
        **s3.variables,
        "NVILA_STORE_URI": "s3://models/lifecycle",
        "NVILA_TRACKING_URI": mlflow_server.url,
    }
    here = make_workspace()
    summary = here.run("run", **variables).json
    assert summary["passed"] is True

    client = MlflowClient(mlflow_server.url)
    (experiment,) = [found for found in client.search_experiments() if found.name == "nvila"]
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.run_name: run.info.status for run in runs} == dict.fromkeys(
        (summary["run_id"], *STEPS), "FINISHED"
    )
    # Not a database of the workspace's own beside the server's.
    assert not (here.path / "mlflow.db").exists()

    stored = [one.object_name for one in s3.client().list_objects("models", prefix="lifecycle/", recursive=True)]
    for step in STEPS:
        assert any(name.startswith(f"lifecycle/{step}/") and name.endswith("/manifest.json") for name in stored), step
    version = client.get_model_version_by_alias("micro", "candidate")
    assert str(version.source).startswith("s3://models/lifecycle/")

    # Another machine has nothing but the addresses.
    there = make_workspace()
    shown = there._start("lineage", "models:/micro@candidate", "--verify", **variables)
    assert shown.finish() == 0, shown.err
    again = there.run("run", **variables).json
    reused = {name for name, phase in there.phases(again["run_id"]).items() if phase == "reused"}
    assert reused == set(STEPS) - {"register"}
