"""What work costs: GPU-hours or core-hours, energy and money.

Hours are measured. Energy is measured where NVML has a counter and estimated from watts otherwise, and says which.
Money is computed from the prices in the settings; without a price there is no money, rather than an invented one.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from nvila_platform.energy import Gpus, open_gpus
from nvila_platform.settings import Settings

EnergySource = Literal["measured", "estimated"]

_USAGE = re.compile(r"core_hours|gpu_hours|energy_kwh_(measured|estimated)|cost_[a-z]{3}")
_SECONDS_PER_HOUR = 3600.0
_JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What some work took.

    Args:
        gpu_hours: Wall time times GPUs, as they are paid for.
        core_hours: Time that processor cores worked.
        energy_kwh: Energy of the GPUs, or of the cores where there is no GPU; None when nothing says how much.
        energy_source: Whether that was measured; None without an energy.
        cost: Money in `currency`; None without a price.
        currency: Code of the currency.
    """

    gpu_hours: float = 0.0
    core_hours: float = 0.0
    energy_kwh: float | None = None
    energy_source: EnergySource | None = None
    cost: float | None = None
    currency: str = "USD"

    def metrics(self) -> dict[str, float]:
        """Return what is known under names that carry unit and origin: `energy_kwh_estimated`, `cost_usd`."""
        found = {"core_hours": self.core_hours}
        if self.gpu_hours:
            found["gpu_hours"] = self.gpu_hours
        if self.energy_kwh is not None:
            found[f"energy_kwh_{self.energy_source}"] = self.energy_kwh
        if self.cost is not None:
            found[f"cost_{self.currency.lower()}"] = self.cost
        return found


class UsageMeter:
    """Measures from its construction on.

    Args:
        settings: Prices and powers.
        processes: Processes that work like this one; the core time of this one stands for each.
        devices: GPUs that are paid for, over all machines; None takes the visible ones of this machine.
        gpus: Stands in for the GPUs of this machine.
    """

    def __init__(
        self, settings: Settings, *, processes: int = 1, devices: int | None = None, gpus: Gpus | None = None
    ) -> None:
        self._settings = settings
        self._gpus = open_gpus() if gpus is None else gpus
        # A machine without GPUs uses none, however many processes there are.
        self._devices = 0 if not self._gpus.count else self._gpus.count if devices is None else devices
        self._processes = processes
        self._start = (time.monotonic(), _core_seconds(), self._gpus.joules())

    def usage(self) -> Usage:
        """Return what was used so far."""
        started, cores_before, joules_before = self._start
        gpu_hours = (time.monotonic() - started) * self._devices / _SECONDS_PER_HOUR
        core_hours = (_core_seconds() - cores_before) * self._processes / _SECONDS_PER_HOUR
        joules = self._gpus.joules()
        # What the GPUs of other machines took was not measured here, so then the energy is an estimate.
        alone = self._devices <= self._gpus.count
        measured = joules - joules_before if alone and joules is not None and joules_before is not None else None
        return priced(self._settings, gpu_hours=gpu_hours, core_hours=core_hours, joules=measured)


def priced(settings: Settings, *, gpu_hours: float, core_hours: float, joules: float | None = None) -> Usage:
    """Put energy and money to hours.

    Args:
        settings: Prices and powers.
        gpu_hours: Wall time times GPUs.
        core_hours: Time that cores worked.
        joules: Measured energy of the GPUs.
    """
    kwh: float | None
    watts, hours = (settings.watts_per_gpu, gpu_hours) if gpu_hours > 0 else (settings.watts_per_core, core_hours)
    source: EnergySource | None
    if joules is not None:
        kwh, source = joules / _JOULES_PER_KWH, "measured"
    elif watts is not None:
        kwh, source = watts * hours / 1000, "estimated"
    else:
        kwh, source = None, None
    parts = [
        (settings.price_per_gpu_hour, gpu_hours if gpu_hours > 0 else None),
        (settings.price_per_core_hour, core_hours),
        (settings.price_per_kwh, kwh),
    ]
    money = [price * amount for price, amount in parts if price is not None and amount is not None]
    return Usage(
        gpu_hours=gpu_hours,
        core_hours=core_hours,
        energy_kwh=kwh,
        energy_source=source,
        cost=sum(money) if money else None,
        currency=settings.currency,
    )


def summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add up what `Usage.metrics` returned; a name that only some have is the sum of those."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def of_lifecycle(steps: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return what the steps of a run used together, under the names of the run's metrics in MLflow.

    Example:
        >>> of_lifecycle([{"core_hours": 1.0}, {"core_hours": 2.0}])
        {'lifecycle/core_hours': 3.0}
    """
    return {f"lifecycle/{name}": value for name, value in summed(steps).items()}


def usage_of(metrics: Mapping[str, float], part: str = "") -> dict[str, float]:
    """Pick what `Usage.metrics` named out of a step's metrics.

    Args:
        metrics: Metrics of the step.
        part: Which part of the step, named behind each metric; empty for the step as a whole.

    Example:
        >>> usage_of({"loss": 0.5, "core_hours": 2.0, "core_hours_align": 1.0}, "align")
        {'core_hours': 1.0}
    """
    ending = f"_{part}" if part else ""
    return {
        name.removesuffix(ending): value
        for name, value in metrics.items()
        if name.endswith(ending) and _USAGE.fullmatch(name.removesuffix(ending))
    }


def _core_seconds() -> float:
    # Children count once they were waited for, which a step does with its training processes.
    user, system, children_user, children_system, _ = os.times()
    return user + system + children_user + children_system
