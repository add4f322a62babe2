"""The run of a verb in MLflow: when it is opened, and how it ends."""

from __future__ import annotations

from typing import Any

import pytest

from nvila.errors import GateError
from nvila_pipelines.curation.spec import DataSpec
from nvila_pipelines.verb_run import VerbRun, dataset
from nvila_platform.mlflow_backend import connect
from nvila_platform.settings import Settings

KEY = "0123456789abcdef"


def runs_of(settings: Settings) -> list[Any]:
    client = connect(settings)
    experiment = client.get_experiment_by_name(settings.experiment)
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def test_a_run_with_nothing_to_tell_is_not_opened(tracked: Settings) -> None:
    with VerbRun(tracked, "tune", KEY, {}):
        pass
    assert runs_of(tracked) == []


def test_a_run_ends_as_its_work_does(tracked: Settings) -> None:
    def refused() -> None:
        with VerbRun(tracked, "tune", KEY, {"lr": 0.1}) as run:
            assert run.open() is run.open()
            raise GateError("the tuned model fell", "tune less")

    with pytest.raises(GateError):
        refused()
    (found,) = runs_of(tracked)
    assert found.info.run_name == "tune 0123456789ab"
    assert found.info.status == "FAILED"
    assert found.data.params == {"lr": "0.1"}
    assert found.data.tags["nvila.step"] == "tune"


def test_data_have_the_name_that_they_were_given_by() -> None:
    assert dataset(DataSpec(data="s3://data/a.jsonl"), "d" * 64, "training", {"train": 3.0}).name == (
        "s3://data/a.jsonl for training"
    )
    long = dataset(DataSpec(data="+".join(["easy-vqa"] * 100)), "d" * 64, "training", {})
    assert len(long.name) < 250
    assert long.name.startswith("...")
