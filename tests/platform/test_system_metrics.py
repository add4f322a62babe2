"""The load of this machine, really measured, and its way to MLflow."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest

from nvila_platform import system_metrics
from nvila_platform.system_metrics import SystemMetrics


class Samples:
    def __init__(self, wanted: int) -> None:
        self.found: list[tuple[int, Mapping[str, float]]] = []
        self.enough = threading.Event()
        self._wanted = wanted

    def log(self, values: Mapping[str, float], sample: int) -> None:
        self.found.append((sample, values))
        if len(self.found) >= self._wanted:
            self.enough.set()


def test_cores_memory_disk_and_network_are_measured_under_the_names_of_mlflow() -> None:
    samples = Samples(3)
    with SystemMetrics(samples.log, 0.05):
        assert samples.enough.wait(30)
    count = len(samples.found)
    assert [number for number, _ in samples.found] == list(range(count))
    last = samples.found[-1][1]
    names = {"cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"}
    assert {f"system/{name}" for name in names} <= set(last)
    assert 0 <= last["system/cpu_utilization_percentage"] <= 100
    assert last["system/system_memory_usage_megabytes"] > 10
    assert not samples.enough.wait(0.2) or len(samples.found) == count, "it goes on after its end"


def test_nothing_is_measured_without_an_interval() -> None:
    samples = Samples(1)
    with SystemMetrics(samples.log, 0):
        assert not samples.enough.wait(0.3)


def test_what_cannot_be_measured_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> list[object]:
        raise OSError("no such sensor")

    monkeypatch.setattr(system_metrics, "_monitors", broken)
    with SystemMetrics(Samples(1).log, 0.05) as measuring:
        measuring.stop()
    assert caplog.messages == ["the load of this machine is not measured: no such sensor"]
