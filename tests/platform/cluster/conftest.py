"""A step that runs a job against the stand-in of a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fake_kubernetes import Cluster
from tests.train_job_step import Step


@pytest.fixture
def step(kubernetes_cluster: Cluster, tmp_path: Path) -> Iterator[Step]:
    made = Step(kubernetes_cluster, tmp_path)
    yield made
    made.trainer.close()
