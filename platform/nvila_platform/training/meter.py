"""What is known about the stage that trains now: totals, speed, memory and what it used."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nvila.training.observer import StageStart, StepRecord
from nvila.training.throughput import Throughput
from nvila_platform.cost import Usage, UsageMeter
from nvila_platform.settings import Settings

StepFlops = Callable[[StepRecord], float]

_SMOOTHING = 0.05


@dataclass(slots=True)
class Totals:
    """Sums over the steps of a stage that this process saw."""

    steps: int = 0
    skipped: int = 0
    tokens: int = 0
    samples: int = 0
    images: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0

    def add(self, record: StepRecord) -> None:
        """Take a step."""
        self.steps += 1
        self.skipped += record.skipped
        self.tokens += record.tokens
        self.samples += record.samples
        self.images += record.images
        self.seconds += record.seconds
        self.data_seconds += record.data_seconds


class StageMeter:
    """Measures one stage; adding a step takes some microseconds, reading it some tens.

    Args:
        start: The stage.
        settings: Prices, for what it costs.
        peak_flops: Peak operations a second of one device; None when it is not known, and there is no MFU then.
        flops: Operations of a step; None when there is no formula.
    """

    def __init__(
        self, start: StageStart, settings: Settings, *, peak_flops: float | None = None, flops: StepFlops | None = None
    ) -> None:
        self.start = start
        self.totals = Totals()
        self.last: StepRecord | None = None
        self._flops = flops if peak_flops else None
        self._throughput = Throughput(peak_flops * start.world_size if peak_flops else None)
        self._smooth = math.nan
        self._began = time.monotonic()
        self._usage = UsageMeter(settings, processes=start.world_size, devices=start.world_size)

    @property
    def elapsed_s(self) -> float:
        """Time since the stage began in this process."""
        return time.monotonic() - self._began

    def add(self, record: StepRecord) -> None:
        """Take a step."""
        self.totals.add(record)
        self._throughput.add(record, self._flops(record) if self._flops is not None else 0.0)
        if math.isfinite(record.loss):
            old = record.loss if math.isnan(self._smooth) else self._smooth
            self._smooth = old + _SMOOTHING * (record.loss - old)
        self.last = record

    def usage(self) -> Usage:
        """Return what the stage used so far, in this process's attempt."""
        return self._usage.usage()

    def values(self) -> dict[str, float]:
        """Return everything worth showing now; what is not known or not finite is left out."""
        from nvila.training.hardware import memory_bytes

        record = self.last
        if record is None:
            return {}
        found: dict[str, float | None] = {
            "loss": self._smooth,
            "loss_step": record.loss,
            "grad_norm": record.grad_norm,
            "lr_scale": record.lr_scale,
            "skipped_steps": float(self.totals.skipped),
        }
        speed = self._throughput.speed(record.steps - record.step)
        if speed is not None:
            found |= {
                "tokens_per_second": speed.tokens_per_second,
                "samples_per_second": speed.samples_per_second,
                "images_per_second": speed.images_per_second,
                "mfu": speed.mfu,
                "data_share": speed.data_share,
                "seconds_left": speed.seconds_left,
            }
        found["memory_gib"] = memory_bytes() / 2**30
        return _known(found)


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
