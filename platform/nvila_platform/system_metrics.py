"""How busy the machine is while a run goes on: cores, memory, disk, network and GPUs, for MLflow's own tab of them.

MLflow's monitors measure; what they find goes through a tracker, so that an outage costs nothing here either.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from nvila_platform.mlflow_backend import configure_environment, one_line

logger = logging.getLogger(__name__)

# MLflow's interface shows metrics with this prefix apart from the others.
PREFIX = "system/"
Log = Callable[[Mapping[str, float], int], object]


class SystemMetrics:
    """Measures in a thread for the time of a `with` block; never raises.

    Args:
        log: Takes values and the number of the sample.
        interval_s: Seconds between two samples; 0 takes none.
    """

    def __init__(self, log: Log, interval_s: float) -> None:
        self._log = log
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to measure."""
        if self._interval_s > 0:
            configure_environment()
            self._thread.start()

    def stop(self) -> None:
        """Measure no more; what is under way is waited for."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        try:
            monitors = _monitors()
            sample = 0
            # The shortest run has one sample, too.
            self._log(_measure(monitors), sample)
            while not self._stop.wait(self._interval_s):
                sample += 1
                self._log(_measure(monitors), sample)
        except Exception as error:  # a driver that is odd is no reason to end a run
            logger.warning("the load of this machine is not measured: %s", one_line(error))


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    # MLflow leaves these without annotations.
    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]  # type: ignore[no-untyped-call]
    try:
        monitors.append(GPUMonitor())  # type: ignore[no-untyped-call]
    except (ImportError, RuntimeError) as error:
        logger.debug("no GPU is measured: %s", one_line(error))
    return monitors


def _measure(monitors: list[Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        values |= {f"{PREFIX}{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
        monitor.clear_metrics()
    return values
