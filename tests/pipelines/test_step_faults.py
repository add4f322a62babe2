"""Steps over a real S3 service: artifacts that are gone, the same run twice, a service that is away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nvila.errors import InfrastructureError
from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.context import StepContext
from nvila_pipelines.steps.runner import RunContext, run_step
from nvila_pipelines.steps.table import StepSpec
from nvila_platform.mlflow_backend import connect
from nvila_platform.registration import register_model
from nvila_platform.settings import Settings
from nvila_platform.store import open_store

if TYPE_CHECKING:
    from tests.conftest import S3Service

MachineRun = Callable[[str], RunContext]


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make every step write one file, and tell which worked."""
    ran: list[str] = []

    def work(context: StepContext) -> dict[str, float]:
        ran.append(context.out_dir.parent.name)
        (context.out_dir / "w.bin").write_bytes(b"weights")
        return {}

    monkeypatch.setattr(StepSpec, "load", lambda self: work)
    return ran


@pytest.fixture
def machine(s3: S3Service, tmp_path: Path) -> MachineRun:
    """A run of one name on a machine of that name; all machines share the store."""

    def make(name: str) -> RunContext:
        uri = f"s3://models/{tmp_path.name}"
        settings = Settings.load(tmp_path / name, {**s3.variables, "NVILA_STORE_URI": uri})
        return RunContext(run_id="nightly", settings=settings)

    return make


def test_a_hit_on_a_deleted_artifact_is_worked_again(
    worked: list[str], machine: MachineRun, micro: Recipe, s3: S3Service, tmp_path: Path
) -> None:
    ref = run_step("data", micro, {}, machine("one"))
    assert run_step("data", micro, {}, machine("two")) == ref
    assert worked == ["data"]
    s3.client().remove_object(bucket_name="models", object_name=f"{tmp_path.name}/content/{ref.digest}/w.bin")
    again = run_step("data", micro, {}, machine("three"))
    assert worked == ["data", "data"]
    assert again.digest == ref.digest
    assert (open_store(machine("four").settings).fetch(again) / "w.bin").read_bytes() == b"weights"


def test_a_deleted_folder_is_worked_again(worked: list[str], micro: Recipe, settings: Settings) -> None:
    import shutil

    run = RunContext(run_id="nightly", settings=settings)
    ref = run_step("data", micro, {}, run)
    shutil.rmtree(Path(settings.store_uri) / "data")
    assert run_step("data", micro, {}, run).digest == ref.digest
    assert worked == ["data", "data"]


def test_the_same_run_triggered_twice_on_two_machines_ends_as_one(
    worked: list[str], machine: MachineRun, micro: Recipe, tracked: Settings
) -> None:
    found: list[str] = []
    both = threading.Barrier(2)

    def trigger(name: str) -> None:
        run = machine(name)
        both.wait(30)
        ref = run_step("data", micro, {}, run)
        found.append(register_model(tracked, "nvila", ref, None, {}).model_uri)

    threads = [threading.Thread(target=trigger, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert 1 <= len(worked) <= 2, "machines do not share a lock, but at most both work"
    digests = {tags["nvila.digest"] for tags in (one.tags for one in connect(tracked).search_model_versions())}
    assert len(digests) == 1
    assert len(found) == 2
    third = run_step("data", micro, {}, machine("three"))
    assert third.digest in digests
    assert len(worked) <= 2


def test_a_store_that_is_away_ends_the_step_for_now_and_the_same_run_goes_on(
    worked: list[str], machine: MachineRun, micro: Recipe, closed_endpoint: str
) -> None:
    run = machine("one")
    away = replace(run, settings=replace(run.settings, s3_endpoint=closed_endpoint))
    with pytest.raises(InfrastructureError) as caught:
        run_step("data", micro, {}, away)
    assert caught.value.exit_code == 75
    assert "the S3 service cannot be reached" in caught.value.message
    assert not worked
    run_step("data", micro, {}, run)
    assert worked == ["data"]
