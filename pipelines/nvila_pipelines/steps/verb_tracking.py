"""Tasks that run a verb, in MLflow: each a run below that of their pipeline."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from nvila_pipelines.report.kubeflow import numbers_of
from nvila_pipelines.steps.pipeline_job import PipelineJob, run_name
from nvila_platform.pipeline_runs import RUN_TAG, kubeflow_tags, parent_run
from nvila_platform.settings import Settings

# They open runs of their own, which find the parent where Kubeflow's MLflow plugin would put it.
_TRACK_THEMSELVES = frozenset({"quantize", "tune"})
_PARENT = "MLFLOW_RUN_ID"
Tell = Callable[[Sequence[str], Mapping[str, Any]], None]


@contextmanager
def below_pipeline(settings: Settings, job: PipelineJob, verb: str) -> Iterator[Tell]:
    """Track the work of a `with` block below its pipeline's run, which the first task makes.

    Args:
        settings: Where MLflow is.
        job: The pipeline's run; one without a name tracks nothing.
        verb: What the task runs.

    Yields:
        What takes the words of the verb and what it said.
    """
    if not job.name:
        yield lambda words, said: None
        return
    name = run_name(job)
    parent = parent_run(settings, name, kubeflow_tags(settings, job.id))
    before = os.environ.get(_PARENT)
    if parent is not None:
        os.environ[_PARENT] = parent
    try:
        if verb in _TRACK_THEMSELVES:
            yield lambda words, said: None
        else:
            with _tracked(settings, name, verb) as tell:
                yield tell
    finally:
        if before is None:
            os.environ.pop(_PARENT, None)
        else:
            os.environ[_PARENT] = before


@contextmanager
def _tracked(settings: Settings, name: str, verb: str) -> Iterator[Tell]:
    from nvila_platform.system_metrics import SystemMetrics
    from nvila_platform.tracking import open_tracker

    with (
        open_tracker(settings, verb, tags={RUN_TAG: name}) as tracker,
        SystemMetrics(tracker.log_metrics, settings.system_metrics_s),
    ):

        def tell(words: Sequence[str], said: Mapping[str, Any]) -> None:
            tracker.log_params({"arguments": shlex.join(words)})
            tracker.log_metrics(numbers_of(said))
            if said.get("reason"):
                tracker.set_tags({"nvila.verdict": said["reason"]})

        yield tell
