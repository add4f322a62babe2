"""Delivers tracked events to MLflow: creates the run, batches, and replays what an outage left in files."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nvila_platform.mlflow_backend import artifact_location, is_rejection, one_line, retrying
from nvila_platform.tracking_buffer import BufferFile, Event, RunSpec, batches
from nvila_platform.tracking_datasets import send_datasets
from nvila_platform.tracking_metrics import clean_name, values_of, values_sender

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from nvila_platform.settings import Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")

PENDING = "pending:"
"""Prefix of a reference to a run that is known by its local id only, because MLflow has not created it yet."""

_LOCAL_ID_TAG = "nvila.local_id"
_PARENT_TAG = "mlflow.parentRunId"
_MISSING_PARENT_TAG = "nvila.missing_parent"
# The parent's thread may be creating the database; only this run's own thread waits.
_PARENT_WAIT_S = 30.0

# MLflow's limits for one request and one value.
_MAX_METRICS = 1000
_MAX_PARAMS = 100
_MAX_PARAM_LENGTH = 6000
_MAX_TAG_LENGTH = 8000


class RunSink:
    """Sends events of one run. Every method is safe to repeat with the same events."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.run_id = run_id
        self._client = client
        self._send_values = values_sender(client, run_id)

    def send(self, batch: Sequence[Event]) -> None:
        """Deliver neighbouring events of one kind.

        What MLflow refuses for good (a parameter that changed its value, a file that is gone) is left out with a
        notice; everything else that goes wrong is raised for the caller to keep the events.
        """
        kind = batch[0].kind
        if kind == "metrics":
            self._send_each(values_of(batch), _MAX_METRICS, self._send_values)
        elif kind == "params":
            self._send_each(_pairs(batch), _MAX_PARAMS, self._send_params)
        elif kind == "tags":
            self._send_each(_pairs(batch), _MAX_PARAMS, self._send_tags)
        elif kind == "artifact":
            self._send_each(batch, 1, self._send_artifact)
        elif kind == "dataset":
            self._send_each(batch, _MAX_PARAMS, partial(send_datasets, self._client, self.run_id))
        else:
            self._send_each(batch, 1, self._terminate)

    def _send_each(self, items: Sequence[T], limit: int, send: Callable[[Sequence[T]], None]) -> None:
        for start in range(0, len(items), limit):
            self._send_part(items[start : start + limit], send)

    def _send_part(self, items: Sequence[T], send: Callable[[Sequence[T]], None]) -> None:
        """Send, halving what is refused until only the refused item is left out."""
        try:
            retrying(lambda: send(items))
        except Exception as error:
            if not isinstance(error, FileNotFoundError) and not is_rejection(error):
                raise
            if len(items) == 1:
                logger.warning("MLflow refused %s of run %s: %s", items[0], self.run_id, one_line(error))
                return
            middle = len(items) // 2
            self._send_part(items[:middle], send)
            self._send_part(items[middle:], send)

    def _send_params(self, pairs: Sequence[tuple[str, str]]) -> None:
        from mlflow.entities import Param

        params = [Param(name, value[:_MAX_PARAM_LENGTH]) for name, value in dict(pairs).items()]
        self._client.log_batch(self.run_id, params=params)

    def _send_tags(self, pairs: Sequence[tuple[str, str]]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(name, value[:_MAX_TAG_LENGTH]) for name, value in dict(pairs).items()]
        self._client.log_batch(self.run_id, tags=tags)

    def _send_artifact(self, events: Sequence[Event]) -> None:
        path = Path(str(events[0].values["path"]))
        if not path.exists():
            raise FileNotFoundError(f"{path} is gone")
        self._client.log_artifact(self.run_id, str(path))

    def _terminate(self, events: Sequence[Event]) -> None:
        self._client.set_terminated(self.run_id, str(events[0].values["status"]), events[0].time_ms)


def open_sink(client: MlflowClient, settings: Settings, spec: RunSpec, may_exist: bool) -> RunSink:
    """Create the run in MLflow.

    Args:
        client: Connected client.
        settings: Where a new experiment keeps its files.
        spec: The run.
        may_exist: Whether an earlier attempt may have created it already; then it is looked up first.
    """
    experiment_id = _below(client, spec.parent) or retrying(lambda: _experiment_id(client, settings, spec.experiment))
    found = _find(client, experiment_id, spec.local_id) if may_exist else None
    if found is not None:
        return RunSink(client, found)
    tags = {clean_name(name): value[:_MAX_TAG_LENGTH] for name, value in spec.tags.items()}
    tags[_LOCAL_ID_TAG] = spec.local_id
    if spec.parent:
        parent = _resolve(client, experiment_id, spec.parent, wait_s=0 if may_exist else _PARENT_WAIT_S)
        tags |= {_PARENT_TAG: parent} if parent else {_MISSING_PARENT_TAG: spec.parent}
    run = retrying(lambda: client.create_run(experiment_id, spec.start_ms, tags, spec.name))
    return RunSink(client, str(run.info.run_id))


def _below(client: MlflowClient, parent: str | None) -> str | None:
    """Return the experiment of a parent: pages of MLflow show runs nested in their own experiment only.

    None where there is no such run.
    """
    if not parent or parent.startswith(PENDING):
        return None
    try:
        return str(retrying(lambda: client.get_run(parent)).info.experiment_id)
    except Exception as error:
        if not is_rejection(error):
            raise
        return None


def replay(client: MlflowClient, settings: Settings, buffer: BufferFile, last_status: str | None = None) -> RunSink:
    """Deliver a buffer file from its start; the file itself stays.

    Args:
        client: Connected client.
        settings: Where a new experiment keeps its files.
        buffer: A file that this process has locked.
        last_status: How to end a run whose file does not say how it ended; None leaves it running.

    Raises:
        ValueError: The file does not say which run it belongs to.
    """
    spec, events = buffer.read()
    sink = open_sink(client, settings, spec, may_exist=True)
    if last_status and not any(event.kind == "close" for event in events):
        last_ms = events[-1].time_ms if events else spec.start_ms
        events.append(Event(kind="close", values={"status": last_status}, time_ms=last_ms))
    for batch in batches(events):
        sink.send(batch)
    return sink


def replay_left_behind(client: MlflowClient, settings: Settings, folder: Path, stop: Callable[[], bool]) -> None:
    """Deliver and remove the files of runs whose process is gone, oldest first, until `stop` says so.

    A file that can never be replayed is renamed, with a notice.
    """
    for path in sorted(folder.glob("*.jsonl")):
        buffer = None if stop() else BufferFile.claim(path)
        if buffer is None:
            continue
        try:
            # Nobody holds the file, so a run that did not say how it ended was killed.
            sink = replay(client, settings, buffer, last_status="KILLED")
            buffer.remove()
            logger.info("replayed %s into run %s", path.name, sink.run_id)
        except Exception as error:
            if isinstance(error, ValueError) or is_rejection(error):
                logger.warning("cannot replay %s: %s; kept as %s", path.name, one_line(error), buffer.set_aside().name)
                continue
            client.search_experiments(max_results=1)  # raises when it is MLflow that is away, not this file at fault
            logger.warning("%s stays for a later replay: %s", path.name, one_line(error))
        finally:
            buffer.close()


def _experiment_id(client: MlflowClient, settings: Settings, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location(settings)))
        except Exception as error:
            # Another process was first.
            experiment = client.get_experiment_by_name(name) if is_rejection(error) else None
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        logger.warning("MLflow experiment %r was deleted; it is restored to take this run", name)
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _find(client: MlflowClient, experiment_id: str, local_id: str) -> str | None:
    query = f"tags.`{_LOCAL_ID_TAG}` = '{local_id}'"
    runs = retrying(lambda: client.search_runs([experiment_id], query, max_results=1))
    return str(runs[0].info.run_id) if runs else None


def _resolve(client: MlflowClient, experiment_id: str, parent: str, wait_s: float) -> str | None:
    """Return the run id of a parent, waiting a little for one that is being created by another process."""
    if not parent.startswith(PENDING):
        return parent
    deadline = time.monotonic() + wait_s
    while True:
        found = _find(client, experiment_id, parent.removeprefix(PENDING))
        if found is not None or time.monotonic() >= deadline:
            return found
        time.sleep(0.25)


def _pairs(batch: Sequence[Event]) -> list[tuple[str, str]]:
    values: Mapping[str, str] = {clean_name(k): str(v) for event in batch for k, v in event.values.items()}
    return list(values.items())
