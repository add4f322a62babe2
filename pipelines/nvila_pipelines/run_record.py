"""What the event log says about a run: how long every step took and whether it was reused."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from nvila_pipelines.steps.runner import FINISHED, REUSED
from nvila_platform.telemetry import Event

# Events are stamped in milliseconds. A step that took less (the gate, on a fast machine) still took time: 0 is the
# mark of a reused one.
SHORTEST_S = 0.001


@dataclass(slots=True)
class RunRecord:
    """Collects events.

    Args:
        seconds: Time of every finished step, at least a millisecond; 0 for a reused one.
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
            took = (now - self._started[event.step]).total_seconds()
            self.seconds[event.step] = max(round(took, 3), SHORTEST_S)
