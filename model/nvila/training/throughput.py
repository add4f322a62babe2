"""How fast a stage trains, over the steps of the recent past."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from nvila.training.observer import StepRecord

WINDOW_STEPS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Means over the window.

    Args:
        tokens_per_second: Positions without padding, of all processes.
        samples_per_second: Conversations, of all processes.
        images_per_second: Tiles and frames, of all processes.
        mfu: Share of the devices' peak that the model's own operations took; None where the peak is not known.
        data_share: Share of the time that was spent waiting for data.
        seconds_left: Time that the rest of the stage takes at this speed.
    """

    tokens_per_second: float
    samples_per_second: float
    images_per_second: float
    mfu: float | None
    data_share: float
    seconds_left: float


class Throughput:
    """Sums over the last steps of one stage; adding a step takes constant time.

    Args:
        peak_flops: Peak operations a second of all devices together; None when it is not known.
        window: Steps that count.
    """

    def __init__(self, peak_flops: float | None = None, window: int = WINDOW_STEPS) -> None:
        self._peak = peak_flops
        self._window = window
        self._steps: deque[tuple[float, ...]] = deque()
        self._sums = [0.0] * 6

    def add(self, record: StepRecord, flops: float = 0.0) -> None:
        """Take a step; `flops` are its operations over all processes."""
        row = (record.tokens, record.samples, record.images, flops, record.data_seconds, record.seconds)
        self._steps.append(row)
        self._sums = [total + value for total, value in zip(self._sums, row, strict=True)]
        if len(self._steps) > self._window:
            oldest = self._steps.popleft()
            self._sums = [total - value for total, value in zip(self._sums, oldest, strict=True)]

    def speed(self, steps_left: int) -> Speed | None:
        """Return the means, or None before a step that took any time."""
        tokens, samples, images, flops, data_seconds, seconds = self._sums
        if not self._steps or seconds <= 0:
            return None
        return Speed(
            tokens_per_second=tokens / seconds,
            samples_per_second=samples / seconds,
            images_per_second=images / seconds,
            mfu=flops / seconds / self._peak if self._peak and flops > 0 else None,
            data_share=min(1.0, max(0.0, data_seconds / seconds)),
            seconds_left=max(0, steps_left) * seconds / len(self._steps),
        )
