"""A verb that works on a model, as a run in MLflow: what it read, was told and measured; its versions point to it."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from nvila_platform.model_card import ModelCard
from nvila_platform.registration import register_model, registered_version
from nvila_platform.registry import ModelVersion
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef
from nvila_platform.system_metrics import SystemMetrics
from nvila_platform.tracking import Tracker, open_tracker
from nvila_platform.tracking_datasets import DatasetInput

if TYPE_CHECKING:
    from nvila_pipelines.curation.spec import DataSpec

# MLflow may be in the middle of its first start, which takes seconds.
_RUN_ID_S = 60.0
_LONGEST_NAME = 200


class VerbRun:
    """The run of a verb, for the time of a `with` block. It is opened when there is something to tell.

    A verb that finds its work finished opens one only for a version that it registers, which then has figures, too.

    Args:
        settings: Where MLflow is.
        step: Step of the artifact.
        key: Content key of the work; the beginning is part of the name.
        params: What was asked for.
        datasets: What is read.
    """

    def __init__(
        self,
        settings: Settings,
        step: str,
        key: str,
        params: Mapping[str, object],
        datasets: tuple[DatasetInput, ...] = (),
    ) -> None:
        self._settings = settings
        self._step, self._name = step, f"{step} {key[:12]}"
        self._params, self._datasets = params, datasets
        self._tracker: Tracker | None = None
        self._load: SystemMetrics | None = None

    def open(self) -> Tracker:
        """Open the run, if it is not open, and return its tracker."""
        if self._tracker is None:
            self._tracker = open_tracker(self._settings, self._name, tags={"nvila.step": self._step})
            self._tracker.log_params(self._params)
            self._tracker.log_datasets(self._datasets)
            self._load = SystemMetrics(self._tracker.log_metrics, self._settings.system_metrics_s)
            self._load.start()
        return self._tracker

    def register(
        self,
        name: str,
        ref: ArtifactRef,
        metrics: Mapping[str, float],
        tags: Mapping[str, object],
        card: ModelCard,
    ) -> ModelVersion:
        """Register an artifact as a version that points to this run; one that it has already is returned.

        Args:
            name: Registered model.
            ref: The artifact.
            metrics: Its figures.
            tags: Of the version.
            card: Of the version.

        Raises:
            ConfigError: The name is none that MLflow takes.
            InfrastructureError: The registry failed.
        """
        known = registered_version(self._settings, name, ref)
        if known is not None:
            return known
        tracker = self.open()
        tracker.log_metrics(metrics)
        tracker.set_tags({"nvila.digest": ref.digest, "nvila.key": ref.key})
        run_id = tracker.wait_run_id(_RUN_ID_S)
        return register_model(self._settings, name, ref, run_id, tags, card)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracker is not None and self._load is not None:
            self._load.stop()
            self._tracker.__exit__(kind, error, trace)


def dataset(spec: DataSpec, digest: str, context: str, numbers: Mapping[str, float]) -> DatasetInput:
    """Return data that a verb was given as an input of its run.

    Args:
        spec: The data.
        digest: Identity of its files.
        context: What it is read for.
        numbers: Counts, such as samples.
    """
    place = spec.data if len(spec.data) <= _LONGEST_NAME else f"...{spec.data[-_LONGEST_NAME:]}"
    return DatasetInput(name=f"{place} for {context}", context=context, digest=digest, uri=spec.data, numbers=numbers)
