"""A job that a killed step left is deleted at the end of its run, and nobody else's is."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.fake_kubernetes import Call
from tests.fake_trainer import GROUP, JOBS
from tests.train_job_step import Step

from nvila_platform.cluster.trainjob import API_VERSION
from nvila_platform.launch.job_notes import JobNote, end_jobs, note_job


def leave(step: Step, tmp_path: Path, run_id: str = "run-1") -> None:
    """What there is after a step was killed while its job ran."""
    name = step.launcher().job_name
    step.cluster.put(GROUP, JOBS, {"apiVersion": API_VERSION, "kind": "TrainJob", "metadata": {"name": name}})
    note_job(tmp_path, JobNote(name=name, namespace=None, run_id=run_id))


def test_a_job_that_is_complete_leaves_no_note(step: Step, tmp_path: Path) -> None:
    step.noted = (tmp_path, "run-1")
    seen: list[list[Path]] = []

    def story() -> None:
        seen.append(list((tmp_path / "jobs").iterdir()))
        step.trainer.start()
        step.trainer.complete()

    step.play(story)
    assert [path.stem for path in seen[0]] == [step.launcher().job_name]
    assert list((tmp_path / "jobs").iterdir()) == []


@pytest.mark.parametrize(("follower", "deleted"), [("run-1", True), ("run-2", False)])
def test_what_a_run_left_is_deleted_unless_another_has_taken_it_over(
    step: Step, tmp_path: Path, follower: str, deleted: bool
) -> None:
    leave(step, tmp_path, follower)
    said = end_jobs(tmp_path, "run-1")
    assert (step.cluster.all(GROUP, JOBS) == []) is deleted
    assert bool(said) is deleted
    assert (list((tmp_path / "jobs").iterdir()) == []) is deleted


def test_a_job_that_has_failed_stays_to_be_looked_at(step: Step, tmp_path: Path) -> None:
    leave(step, tmp_path)
    step.trainer.set_status(("Failed", "True", "a node was lost"))
    assert end_jobs(tmp_path, "run-1") == []
    assert len(step.cluster.all(GROUP, JOBS)) == 1


def test_what_cannot_be_deleted_is_said_with_the_command(step: Step, tmp_path: Path) -> None:
    leave(step, tmp_path)
    step.cluster.forbidden.add(Call("delete", GROUP, JOBS))
    (line,) = end_jobs(tmp_path, "run-1")
    assert f"kubectl delete trainjob {step.launcher().job_name}" in line
    assert len(list((tmp_path / "jobs").iterdir())) == 1
