"""Hours, energy and money of work, and where each number comes from."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nvila_platform import energy
from nvila_platform.cost import Usage, UsageMeter, priced, summed, usage_of
from nvila_platform.energy import Gpus, open_gpus
from nvila_platform.settings import Settings

PRICES = {
    "NVILA_PRICE_PER_GPU_HOUR": "2",
    "NVILA_PRICE_PER_CORE_HOUR": "0.1",
    "NVILA_PRICE_PER_KWH": "0.5",
    "NVILA_WATTS_PER_GPU": "500",
    "NVILA_WATTS_PER_CORE": "10",
    "NVILA_CURRENCY": "EUR",
}


class Nvml:
    """Stands in for NVML, which needs a driver: two devices whose counters a test moves."""

    class NVMLError(Exception):
        """As NVML raises."""

    def __init__(self, *, counters: bool = True, driver: bool = True) -> None:
        self.millijoules = {"0": 1_000_000, "GPU-b": 5_000_000}
        self._counters, self._driver = counters, driver

    def nvmlInit(self) -> None:  # noqa: N802
        if not self._driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return ["0", "GPU-b"][index]

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:  # noqa: N802
        return name

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if not self._counters:
            raise self.NVMLError("Not Supported")
        return self.millijoules[handle]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    fake = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def settings(**environ: str) -> Settings:
    return Settings.load(environ=environ)


def test_gpus_cost_hours_and_measured_energy() -> None:
    usage = priced(settings(**PRICES), gpu_hours=4, core_hours=8, joules=3.6e6)
    assert usage.metrics() == {"core_hours": 8, "gpu_hours": 4, "energy_kwh_measured": 1, "cost_eur": 8 + 0.8 + 0.5}


def test_energy_of_gpus_is_estimated_where_nothing_measures_it() -> None:
    usage = priced(settings(**PRICES), gpu_hours=4, core_hours=8)
    assert usage.metrics()["energy_kwh_estimated"] == 2
    assert usage.cost == pytest.approx(8 + 0.8 + 1)


def test_cores_are_what_a_machine_without_gpus_uses() -> None:
    usage = priced(settings(**PRICES), gpu_hours=0, core_hours=8)
    assert usage.metrics() == {"core_hours": 8, "energy_kwh_estimated": 0.08, "cost_eur": pytest.approx(0.8 + 0.04)}


def test_nothing_is_invented_without_prices() -> None:
    assert priced(settings(), gpu_hours=4, core_hours=8).metrics() == {"core_hours": 8, "gpu_hours": 4}
    assert priced(settings(NVILA_PRICE_PER_GPU_HOUR="2"), gpu_hours=0, core_hours=8).cost is None
    assert priced(settings(NVILA_PRICE_PER_KWH="2"), gpu_hours=1, core_hours=8).cost is None


def test_meter_counts_the_time_that_cores_work() -> None:
    meter = UsageMeter(settings(NVILA_PRICE_PER_CORE_HOUR="3600"), processes=2, gpus=Gpus(0))
    started = time.process_time()
    while time.process_time() - started < 0.1:
        pass
    time.sleep(0.1)
    usage = meter.usage()
    assert usage.gpu_hours == 0
    assert 0.15 <= usage.core_hours * 3600 < 0.4  # the system counts in hundredths of a second
    assert usage.cost == pytest.approx(usage.core_hours * 3600)


def test_meter_reads_the_counters_of_visible_gpus(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b")
    meter = UsageMeter(settings())
    nvml.millijoules = {"0": 10**9, "GPU-b": 5_000_000 + 3_600_000_000}
    time.sleep(0.01)
    usage = meter.usage()
    assert (usage.energy_kwh, usage.energy_source) == (1, "measured")
    assert 0 < usage.gpu_hours < 1 / 3600


def test_energy_of_other_machines_is_not_measured(nvml: Nvml) -> None:
    usage = UsageMeter(settings(**PRICES), devices=16).usage()
    assert usage.energy_source == "estimated"


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 2), ("1", 1), ("0,1", 2), ("", 0), ("-1", 0), ("0,7,1", 1), ("GPU-b", 1)]
)
def test_only_visible_gpus_count(visible: str | None, count: int, nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert open_gpus().count == count
    assert (open_gpus().joules() is None) == (count == 0)


def test_gpu_without_a_counter_has_no_measured_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(counters=False))
    assert open_gpus().joules() is None


@pytest.mark.parametrize(
    ("torch", "folders", "count"),
    [
        (SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True, device_count=lambda: 3)), 0, 3),
        (SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False)), 2, 0),
        (None, 2, 2),
        (None, None, 0),
    ],
    ids=["torch", "torch-without-cuda", "driver", "nothing"],
)
@pytest.mark.parametrize("installed", [True, False], ids=["no-driver", "no-pynvml"])
def test_gpus_are_counted_without_nvml(
    torch: Any, folders: int | None, count: int, installed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(driver=False) if installed else None)
    if torch is None:
        monkeypatch.delitem(sys.modules, "torch", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "torch", torch)
    if folders is not None:
        for index in range(folders):
            (tmp_path / "gpus" / str(index)).mkdir(parents=True)
    monkeypatch.setattr(energy, "_DRIVER", tmp_path / "gpus")
    gpus = open_gpus()
    assert (gpus.count, gpus.joules()) == (count, None)


def test_sums_keep_measured_and_estimated_apart() -> None:
    measured = Usage(gpu_hours=1, energy_kwh=2, energy_source="measured", cost=3).metrics()
    estimated = Usage(core_hours=1, energy_kwh=2, energy_source="estimated").metrics()
    total = summed([measured, measured, estimated])
    assert total == {
        "core_hours": 1,
        "gpu_hours": 2,
        "energy_kwh_measured": 4,
        "energy_kwh_estimated": 2,
        "cost_usd": 6,
    }


def test_usage_is_found_among_the_metrics_of_a_step() -> None:
    metrics = {"loss": 0.5, "core_hours": 2.0, "cost_usd": 3.0, "cost_usd_align": 1.0, "energy_kwh_measured_align": 4.0}
    assert usage_of(metrics) == {"core_hours": 2.0, "cost_usd": 3.0}
    assert usage_of(metrics, "align") == {"cost_usd": 1.0, "energy_kwh_measured": 4.0}
    assert usage_of(metrics, "ali") == {}
