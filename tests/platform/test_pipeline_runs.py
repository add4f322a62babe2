"""The MLflow runs of a pipeline whose tasks are on different machines, in a real MLflow."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from nvila_platform import mlflow_backend
from nvila_platform.pipeline_runs import RUN_TAG, end_runs, kubeflow_tags, parent_run, unfinished_tasks
from nvila_platform.settings import Settings
from nvila_platform.tracking import open_tracker


@pytest.fixture
def client(tracked: Settings) -> MlflowClient:
    return mlflow_backend.connect(tracked)


@pytest.fixture
def away(tracked: Settings) -> Iterator[Settings]:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield replace(tracked, tracking_uri=f"http://127.0.0.1:{closed.getsockname()[1]}")


def runs(client: MlflowClient, settings: Settings) -> dict[str, Run]:
    experiment = client.get_experiment_by_name(settings.experiment)
    assert experiment is not None
    return {str(run.info.run_name): run for run in client.search_runs([experiment.experiment_id])}


def test_the_first_task_makes_the_parent_and_the_others_find_it(tracked: Settings, client: MlflowClient) -> None:
    first = parent_run(tracked, "nightly-1", {"nvila.kfp_run_id": "7"})
    assert first is not None
    assert parent_run(tracked, "nightly-1", {"nvila.kfp_run_id": "8"}) == first
    assert parent_run(tracked, "nightly-2") != first
    made = client.get_run(first)
    assert made.info.run_name == "nightly-1"
    assert made.data.tags.items() >= {RUN_TAG: "nightly-1", "nvila.kfp_run_id": "7"}.items()
    assert str(mlflow_backend.artifact_location(tracked)) in str(made.info.artifact_uri)


def test_a_nested_run_is_no_parent(tracked: Settings) -> None:
    first = parent_run(tracked, "nightly")
    with open_tracker(tracked, "train", first, tags={RUN_TAG: "nightly"}) as nested:
        assert nested.wait_run_id(30) is not None
    assert parent_run(tracked, "nightly") == first


def test_the_run_that_kubeflow_opened_is_taken_and_tagged(
    tracked: Settings, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = client.create_experiment("of-kubeflow")
    given = client.create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    assert parent_run(tracked, "nightly") == given
    assert RUN_TAG not in client.get_run(given).data.tags
    assert parent_run(tracked, "nightly", {"nvila.kfp_run_id": "7"}) == given
    assert client.get_run(given).data.tags.items() >= {RUN_TAG: "nightly", "nvila.kfp_run_id": "7"}.items()
    with open_tracker(tracked, "train", tags={RUN_TAG: "nightly"}) as nested:
        assert nested.wait_run_id(30) is not None
    client.create_run(experiment, tags={"mlflow.parentRunId": given}, run_name="killed")
    assert unfinished_tasks(tracked, "nightly") == ["killed"]
    end_runs(tracked, "nightly", "FAILED", {"nvila.outcome": "FAILED"})
    below = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{given}'")
    assert {run.info.run_name: run.info.status for run in below} == {"train": "FINISHED", "killed": "FAILED"}
    assert client.get_run(given).data.tags["nvila.outcome"] == "FAILED"
    assert client.get_experiment_by_name(tracked.experiment) is None


def test_without_mlflow_the_task_goes_on(
    away: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert parent_run(away, "nightly") is None
    assert "this task is tracked without its run" in caplog.text
    end_runs(away, "nightly", "FAILED", {"nvila.outcome": "FAILED"})
    assert "MLflow does not know how this run ended" in caplog.text
    monkeypatch.setenv("MLFLOW_RUN_ID", "given")
    assert parent_run(away, "nightly", {"nvila.kfp_run_id": "7"}) == "given"


def test_the_end_ends_what_killed_tasks_left_open_and_tags_the_parent(tracked: Settings, client: MlflowClient) -> None:
    parent = parent_run(tracked, "nightly")
    other = parent_run(tracked, "other")
    assert parent is not None
    assert other is not None
    with open_tracker(tracked, "done", parent, tags={RUN_TAG: "nightly"}):
        pass
    experiment = client.get_run(parent).info.experiment_id
    tags = {RUN_TAG: "nightly", "mlflow.parentRunId": parent}
    client.create_run(experiment, tags=tags, run_name="killed")
    end_runs(tracked, "nightly", "KILLED", {"nvila.outcome": "CANCELLED"})
    status = {name: run.info.status for name, run in runs(client, tracked).items()}
    assert status == {"nightly": "KILLED", "killed": "KILLED", "done": "FINISHED", "other": "RUNNING"}
    tagged = {name for name, run in runs(client, tracked).items() if "nvila.outcome" in run.data.tags}
    assert tagged == {"nightly"}


def test_who_gave_us_a_run_ends_it(tracked: Settings, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    given = client.create_run(client.create_experiment(tracked.experiment), run_name="given").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    parent_run(tracked, "nightly", {"nvila.kfp_run_id": "7"})
    end_runs(tracked, "nightly", "FAILED", {"nvila.outcome": "FAILED"})
    found = client.get_run(given)
    assert (found.info.status, found.data.tags["nvila.outcome"]) == ("RUNNING", "FAILED")


@pytest.mark.parametrize(
    ("endpoint", "kfp_run", "expected"),
    [
        ("https://k/pipeline", "7", {"nvila.kfp_run_id": "7", "nvila.run_url": "https://k/pipeline/#/runs/details/7"}),
        ("", "7", {"nvila.kfp_run_id": "7"}),
        ("https://k/pipeline", "", {}),
    ],
    ids=["link", "no-address", "local"],
)
def test_the_link_to_kubeflow(tracked: Settings, endpoint: str, kfp_run: str, expected: dict[str, str]) -> None:
    assert kubeflow_tags(replace(tracked, kfp_endpoint=endpoint), kfp_run) == expected
