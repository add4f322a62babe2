"""What the event log says about a run: how long every step took and whether it was reused."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from nvila_pipelines.steps.runner import FINISHED, REUSED
from nvila_platform.telemetry import Event


@dataclass(slots=True)
class RunRecord:
    """Collects events.

    Args:
        seconds: Time of every finished step, 0 for a reused one.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    _started: dict[str, datetime] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        """Take one event."""
        if event.notice:
            return
        now = datetime.fromisoformat(event.time)
        self._started.setdefault(event.step, now)
        if event.phase == REUSED:
            self.seconds[event.step] = 0.0
        elif event.phase == FINISHED:
            self.seconds[event.step] = round((now - self._started[event.step]).total_seconds(), 2)
