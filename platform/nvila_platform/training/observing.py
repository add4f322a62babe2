"""One observer of a training run that measures once and tells everybody who wants to know."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from nvila.errors import NvilaError, ResourceError
from nvila.progress import Reporter
from nvila.training.observer import StageStart, StepRecord
from nvila_platform.settings import Settings
from nvila_platform.training.history import HISTORY_FILE, HistorySink
from nvila_platform.training.meter import StageMeter, StepFlops
from nvila_platform.training.scrape import ScrapeSink
from nvila_platform.training.sinks import ProgressSink, StepSink, TrackingSink

if TYPE_CHECKING:
    from nvila.data.selection_counts import CurationCounts
    from nvila.training.config import PartName, TrainConfig

logger = logging.getLogger(__name__)

_TERA = 1e12


class TrainingObserver:
    """A `StageObserver` over several sinks. It never raises: a sink that does is left out from then on.

    Args:
        sinks: Who is told.
        settings: Prices.
        peak_flops: Peak operations a second of one device.
        flops: Operations of a step by stage.
    """

    def __init__(
        self,
        sinks: Sequence[StepSink],
        settings: Settings,
        *,
        peak_flops: float | None = None,
        flops: Mapping[str, StepFlops] | None = None,
    ) -> None:
        self._sinks = list(sinks)
        self._settings = settings
        self._peak_flops = peak_flops
        self._flops = flops or {}
        self._meter: StageMeter | None = None
        self._due: dict[int, float] = {}

    def on_stage_start(self, start: StageStart) -> None:
        """Begin to measure a stage."""
        flops = self._flops.get(start.stage)
        meter = StageMeter(start, self._settings, peak_flops=self._peak_flops, flops=flops)
        self._meter = meter
        # The first step of a stage is told, however short the stage before was.
        self._due = dict.fromkeys(map(id, self._sinks), 0.0)
        self._tell(self._sinks, lambda sink: sink.on_stage_start(meter))

    def on_step(self, record: StepRecord) -> None:
        """Measure a step, and tell the sinks whose time has come."""
        meter = self._meter
        if meter is None:
            return
        meter.add(record)
        now = time.monotonic()
        always = record.skipped or record.step >= record.steps
        due = [sink for sink in self._sinks if now >= self._due[id(sink)] or (always and self._ever(sink))]
        if not due:
            return
        values = meter.values()
        self._tell(due, lambda sink: sink.on_step(meter, record, values))
        for sink in due:
            self._due[id(sink)] = now + sink.interval_s

    def on_notice(self, text: str) -> None:
        """Pass it on."""
        self._tell(self._sinks, lambda sink: sink.on_notice(text))

    def on_stage_end(self, stage: str) -> None:
        """Tell what the stage used."""
        meter, self._meter = self._meter, None
        if meter is not None:
            self._tell(self._sinks, lambda sink: sink.on_stage_end(meter))

    def close(self, failed: bool = False) -> None:
        """End all sinks."""
        self._tell(self._sinks, lambda sink: sink.close(failed))
        self._sinks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _tell(self, sinks: Sequence[StepSink], say: Callable[[StepSink], None]) -> None:
        for sink in tuple(sinks):
            try:
                say(sink)
            except Exception:  # what watches training must not end it
                logger.warning("%s is left out of this training run", type(sink).__name__, exc_info=True)
                self._sinks = [other for other in self._sinks if other is not sink]

    @staticmethod
    def _ever(sink: StepSink) -> bool:
        return sink.interval_s != float("inf")


def observe_training(
    config: TrainConfig,
    settings: Settings,
    *,
    out_dir: Path,
    reporter: Reporter,
    curation: Callable[[], CurationCounts] | None = None,
) -> TrainingObserver:
    """Build the observer that the settings ask for, to be used as a context manager by the first process of a run.

    Args:
        config: The training run.
        settings: Prices, addresses, and who tracks.
        out_dir: Folder of the run's outputs; the history goes beside them.
        reporter: Gets progress, and a notice when `/metrics` cannot be offered.
        curation: Counts what curation made of the data; asked once, where there is `/metrics`.

    Raises:
        CapabilityError: `/metrics` is asked for and prometheus-client is not installed.
    """
    sinks: list[StepSink] = [ProgressSink(reporter)]
    try:
        sinks.append(HistorySink(out_dir / HISTORY_FILE))
    except OSError as e:
        reporter.notice(f"this run has no history: {e}")
    if settings.metrics_address:
        try:
            sinks.append(ScrapeSink(settings.metrics_address, _curation(curation, reporter)))
        except ResourceError as e:
            reporter.notice(f"no /metrics: {e}")
    if settings.track_training == "direct":
        from nvila_platform.tracking import open_tracker

        sinks.append(TrackingSink(open_tracker(settings, "train")))
    peak = _peak_flops(config, settings)
    flops = _flops(config, reporter) if peak else {}
    return TrainingObserver(sinks, settings, peak_flops=peak, flops=flops)


def _curation(count: Callable[[], CurationCounts] | None, reporter: Reporter) -> CurationCounts:
    try:
        return count() if count is not None else {}
    except NvilaError as e:  # who trains on the data says what is wrong with them
        reporter.notice(f"no figures of the curation: {e}")
        return {}


def _peak_flops(config: TrainConfig, settings: Settings) -> float | None:
    from nvila.training.hardware import device_name, peak_flops

    if settings.peak_tflops:
        return settings.peak_tflops * _TERA
    return peak_flops(device_name(), config.precision.name)


def _flops(config: TrainConfig, reporter: Reporter) -> dict[str, StepFlops]:
    from nvila.errors import CapabilityError
    from nvila.training.flops import model_flops
    from nvila.training.planning.sizes import nvila_config

    try:
        formula = model_flops(nvila_config(config.model))
    except CapabilityError as e:
        reporter.notice(f"no MFU: {e.message}")
        return {}

    def of(parts: tuple[PartName, ...]) -> StepFlops:
        # A sample's own length stands for what its positions attend to; the shared beginning of a row counts once.
        return lambda record: formula.step(
            parts,
            tokens=record.tokens,
            tiles=record.images,
            context=record.tokens / max(1, record.samples),
        )

    return {stage.name: of(tuple(stage.lr)) for stage in config.stages}
