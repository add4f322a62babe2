"""Experiment tracking that never costs the run anything.

A tracker hands every call to a daemon thread, which imports MLflow, creates the database on first use and sends events
in batches. When MLflow cannot be reached the events go to a file in the workspace; they are sent when it is back, by
this run or by the next one. When it is slower than the run, only so much waits in memory and the rest goes through that
file, too. Tracking reports trouble in the log and never raises.

Example:
    >>> with open_tracker(settings, "train") as tracker:
    ...     tracker.log_params({"lr": 1e-3})
    ...     tracker.log_metrics({"loss": 0.4}, step=10)
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from nvila_platform.mlflow_backend import (
    configure_environment,
    connect,
    one_line,
    parent_from_environment,
    without_password,
)
from nvila_platform.tracking_buffer import BufferFile, Event, Outbox, RunSpec, batches
from nvila_platform.tracking_datasets import DatasetInput
from nvila_platform.tracking_sink import PENDING, RunSink, open_sink, replay, replay_left_behind

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from nvila_platform.settings import Settings

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

_GATHER_S = 0.5
_RETRY_S = 15.0
_CLOSE_S = 20.0


def open_tracker(
    settings: Settings, run_name: str, parent_run_id: str | None = None, tags: Mapping[str, object] | None = None
) -> Tracker:
    """Start tracking one run and return at once.

    Args:
        settings: Tracking address, experiment and workspace.
        run_name: Name shown in MLflow.
        parent_run_id: A run id, or the `handle` of another tracker, that this run is nested under; without one, the
            run that MLFLOW_RUN_ID names.
        tags: Tags of the run.
    """
    configure_environment()
    spec = RunSpec(
        name=run_name,
        experiment=settings.experiment,
        parent=parent_run_id or parent_from_environment(),
        tags={name: str(value) for name, value in (tags or {}).items()},
    )
    return Tracker(settings, spec)


class Tracker:
    """One run in MLflow. Every method returns at once, except those that take a time limit; none raises.

    As a context manager it closes itself: FAILED after an exception, FINISHED otherwise.
    """

    def __init__(self, settings: Settings, spec: RunSpec) -> None:
        self._settings = settings
        self._spec = spec
        self._folder = settings.workspace / "tracking-buffer"
        self._outbox = Outbox()
        self._client: MlflowClient | None = None
        self._sink: RunSink | None = None
        self._buffer: BufferFile | None = None
        self._buffer_lock = threading.Lock()
        self._attempted = False
        self._retry_at = 0.0
        self._out = False
        self._lossy = False
        self._replayed = False
        self._run_id: str | None = None
        self._known = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracking-{spec.name}", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until MLflow created it, for ever during an outage."""
        return self._run_id

    @property
    def handle(self) -> str:
        """A reference to this run that children can be opened with before its run id is known."""
        return self._run_id or f"{PENDING}{self._spec.local_id}"

    def wait_run_id(self, timeout_s: float) -> str | None:
        """Wait for the run id; returns None when MLflow did not answer in time or cannot be reached."""
        self._known.wait(timeout_s)
        return self._run_id

    def log_params(self, params: Mapping[str, object]) -> None:
        """Record settings of the run; nested mappings become dotted names."""
        self._put(Event(kind="params", values=_flat(params)))

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record values at one step. A value that is no number is left out with a notice."""
        values: dict[str, str | float] = {}
        for name, value in metrics.items():
            try:
                values[str(name)] = float(value)
            except (TypeError, ValueError):
                logger.warning("metric %s of run %s is not a number: %r", name, self._spec.name, value)
        self._put(Event(kind="metrics", values=values, step=step))

    def log_artifact(self, path: Path) -> None:
        """Copy a file or folder to the run. It is read later, so it must stay as it is."""
        self._put(Event(kind="artifact", values={"path": str(Path(path).absolute())}))

    def log_datasets(self, datasets: Iterable[DatasetInput]) -> None:
        """Record data sets as inputs of the run."""
        for dataset in datasets:
            self._put(dataset.event())

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags of the run, replacing earlier values."""
        self._put(Event(kind="tags", values={str(name): str(value) for name, value in tags.items()}))

    def finish(self, status: Status = "FINISHED") -> None:
        """End the run now, without waiting until MLflow knows; `close` must still follow.

        Args:
            status: How the run ended.
        """
        self._outbox.finish(Event(kind="close", values={"status": status}))

    def close(self, status: Status = "FINISHED", timeout_s: float = _CLOSE_S) -> None:
        """End the run and send what is left; what cannot be sent in time is kept for the next tracker.

        Args:
            status: How the run ended, unless `finish` said so already.
            timeout_s: How long to wait for MLflow.
        """
        self.finish(status)
        self._thread.join(timeout_s)
        with self._buffer_lock:
            left = self._outbox.abandon()
            if left:
                name = self._spec.name
                logger.warning("the rest of run %s is kept in %s: no answer in %g s", name, self._folder, timeout_s)
            self._write(left)
            if self._buffer is not None:
                self._buffer.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def _put(self, event: Event) -> None:
        if event.values and not self._outbox.put(event):
            with self._buffer_lock:
                self._write([event])

    def _work(self) -> None:
        """Body of the thread: connect, then deliver until the run is closed."""
        self._connect()
        while self._outbox.wait(_GATHER_S, idle_s=_RETRY_S):
            if self._client is None and time.monotonic() >= self._retry_at:
                self._connect()
            for batch in batches(self._outbox.peek()):
                self._deliver(batch)
            self._deliver_overflow()
            if self._client is not None and not self._replayed:
                self._replay_others(self._client)

    def _connect(self) -> None:
        """Open the run in MLflow and deliver what an outage made it buffer."""
        try:
            client = connect(self._settings)
            client.search_experiments(max_results=1)  # proves that the answers come from MLflow
            sink = self._open(client)
        except Exception as error:  # the thread is the boundary: tracking never takes a run down
            self._lost(error)
            return
        if sink is None:
            return
        self._client, self._sink, self._run_id = client, sink, sink.run_id
        self._known.set()
        if self._out:
            logger.info("MLflow is back; run %s is tracked again", self._spec.name)
            self._out = False

    def _open(self, client: MlflowClient) -> RunSink | None:
        may_exist, self._attempted = self._attempted, True
        if self._buffer is None:
            return open_sink(client, self._settings, self._spec, may_exist)
        sink = replay(client, self._settings, self._buffer)
        with self._buffer_lock:
            if self._outbox.abandoned:  # the caller went on writing to the file, which must stay
                return None
            self._remove_read_buffer()
        return sink

    def _remove_read_buffer(self) -> None:
        """Delete the file unless the caller wrote to it after it was read; the caller holds the buffer lock."""
        if self._buffer is not None and self._buffer.fully_read:
            self._buffer.remove()
            self._buffer = None

    def _deliver_overflow(self) -> None:
        """Send what went to the file because too much waited."""
        while self._sink is not None and self._buffer is not None and not self._outbox.abandoned:
            try:
                for batch in batches(self._buffer.read_next()):
                    self._sink.send(batch)
            except Exception as error:  # the thread is the boundary, as above
                self._lost(error)
                return
            with self._buffer_lock:
                if not self._outbox.abandoned:
                    self._remove_read_buffer()

    def _deliver(self, batch: Sequence[Event]) -> None:
        if batch[0].kind == "close":
            # A file that stays behind says how its run ended, so the end follows what the file holds.
            self._deliver_overflow()
        if self._sink is not None and not self._outbox.abandoned:
            try:
                self._sink.send(batch)
            except Exception as error:  # the thread is the boundary, as above
                self._lost(error)
        with self._buffer_lock:
            if self._outbox.abandoned:
                return
            if self._sink is None:
                self._write(batch)
            self._outbox.drop(len(batch))

    def _replay_others(self, client: MlflowClient) -> None:
        # After the first events of this run, so that a long backlog does not hold them up.
        self._replayed = True
        try:
            replay_left_behind(client, self._settings, self._folder, stop=lambda: self._outbox.abandoned)
        except Exception as error:  # the thread is the boundary, as above
            logger.warning("earlier runs stay in %s: %s", self._folder, one_line(error))

    def _lost(self, error: Exception) -> None:
        """Go on without MLflow, saying so once per outage."""
        self._client = self._sink = None
        self._retry_at = time.monotonic() + _RETRY_S
        if not self._out:
            self._out = True
            logger.warning(
                "tracking at %s is out (%s); run %s goes on and its events are kept in %s",
                without_password(self._settings.tracking_uri),
                one_line(error),
                self._spec.name,
                self._folder,
            )

    def _write(self, events: Sequence[Event]) -> None:
        """Append to the buffer file; the caller holds the buffer lock."""
        if not events:
            return
        try:
            if self._buffer is None:
                self._buffer = BufferFile.create(self._folder, self._spec)
            self._buffer.append(events)
        except OSError as error:
            if not self._lossy:
                logger.warning("events of run %s are lost: %s", self._spec.name, error)
            self._lossy = True


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, str | float]:
    flat: dict[str, str | float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat
