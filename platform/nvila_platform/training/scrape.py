"""`/metrics` of a training process.

Nothing is counted while a step runs: a scrape reads the meter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nvila_platform.training.curation import CurationCollector
from nvila_platform.training.exporter import Exporter
from nvila_platform.training.meter import StageMeter
from nvila_platform.training.sinks import BaseSink

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from nvila.data.selection_counts import CurationCounts

_COUNTERS = {
    "steps": "Optimizer steps, skipped ones included.",
    "skipped": "Steps thrown away because their loss or gradient was not finite.",
    "tokens": "Positions without padding, of all processes.",
    "samples": "Conversations, of all processes.",
    "images": "Tiles and frames that went through the vision tower, of all processes.",
    "seconds": "Time in optimizer steps.",
    "data_seconds": "Time that steps waited for data.",
}
_COUNTER_NAMES = {"skipped": "skipped_steps", "seconds": "step_seconds", "data_seconds": "data_wait_seconds"}
_GAUGES = {
    "loss": ("loss", "Loss over supervised tokens, smoothed."),
    "grad_norm": ("gradient_norm", "Global gradient norm of the last step before clipping."),
    "lr_scale": ("learning_rate_ratio", "Share of every part's peak learning rate."),
    "tokens_per_second": ("tokens_per_second", "Tokens a second over the last steps."),
    "samples_per_second": ("samples_per_second", "Samples a second over the last steps."),
    "mfu": ("mfu_ratio", "Share of the devices' peak that the model's own operations took."),
    "data_share": ("data_wait_ratio", "Share of the time of the last steps spent waiting for data."),
    "seconds_left": ("remaining_seconds", "Time that the rest of the stage takes at this speed."),
}
_USED = {
    "gpu_hours": ("gpu_seconds", 3600.0, "GPU time that the stage took: wall time times GPUs."),
    "core_hours": ("core_seconds", 3600.0, "Time that processor cores worked for the stage."),
    "energy_kwh_measured": ("energy_joules_measured", 3.6e6, "Energy that NVML measured."),
    "energy_kwh_estimated": ("energy_joules_estimated", 3.6e6, "Energy by hours and the watts of the settings."),
}


class ScrapeSink(BaseSink):
    """Offers the metrics of all stages of this process.

    Args:
        address: `host:port`; port 0 takes a free one.
        curation: What curation made of the data that are trained on.

    Raises:
        CapabilityError: prometheus-client is not installed.
        ResourceError: The address cannot be listened on.
    """

    def __init__(self, address: str, curation: CurationCounts | None = None) -> None:
        self.interval_s = float("inf")
        self._meters: dict[str, StageMeter] = {}
        self._notices = 0
        self._curation = CurationCollector(lambda: curation or {})
        self._exporter = Exporter(address, self)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._exporter.port

    def on_stage_start(self, meter: StageMeter) -> None:
        """Show the stage from now on."""
        self._meters[meter.start.stage] = meter

    def on_notice(self, text: str) -> None:
        """Count it."""
        self._notices += 1

    def close(self, failed: bool) -> None:
        """Stop listening."""
        self._exporter.close()

    def collect(self) -> Iterator[Metric]:
        """Read the meters; called by prometheus-client for a scrape."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        meters = list(self._meters.items())
        for field, help_text in _COUNTERS.items():
            name = f"nvila_train_{_COUNTER_NAMES.get(field, field)}"
            family: Any = CounterMetricFamily(name, help_text, labels=["stage"])
            for stage, meter in meters:
                family.add_metric([stage], float(getattr(meter.totals, field)))
            yield family
        for name, (unit, factor, help_text) in _USED.items():
            family = CounterMetricFamily(f"nvila_train_{unit}", help_text, labels=["stage"])
            for stage, meter in meters:
                if name in (used := meter.usage().metrics()):
                    family.add_metric([stage], used[name] * factor)
            yield family
        yield CounterMetricFamily("nvila_train_notices", "Notices of the training run.", value=self._notices)
        yield from self._now(GaugeMetricFamily)
        yield from self._curation.collect()

    def _now(self, gauge: Any) -> Iterator[Metric]:
        """What holds for the stage that trains now; stages before it have no speed any more."""
        if not self._meters:
            return
        stage, meter = list(self._meters.items())[-1]
        values = meter.values()
        for name, (suffix, help_text) in _GAUGES.items():
            if name in values:
                family = gauge(f"nvila_train_{suffix}", help_text, labels=["stage"])
                family.add_metric([stage], values[name])
                yield family
        family = gauge("nvila_train_planned_steps", "Optimizer steps of the stage in all.", labels=["stage"])
        family.add_metric([stage], meter.start.steps)
        yield family
        if "memory_gib" in values:
            text = "Peak of the tensors on the GPU, or resident memory of the process without one."
            yield gauge("nvila_train_memory_bytes", text, value=values["memory_gib"] * 2**30)
