"""Being asked to end: a signal is remembered, and the training loop ends where nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from nvila.errors import InfrastructureError


@dataclass(slots=True)
class StopRequest:
    """Whether this process was asked to end, and by what."""

    signal: signal.Signals | None = None

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    def end(self, where: str) -> None:
        """End as the signal asks for, now that everything is saved.

        Args:
            where: What was reached and is saved.

        Raises:
            KeyboardInterrupt: For SIGINT.
            InfrastructureError: For any other signal, and where another process got it.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        name = self.signal.name if self.signal else "a signal to another process"
        raise InfrastructureError(f"training was stopped by {name} {where}", "run the same command again to go on")


@contextmanager
def watched_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request; elsewhere than in the main thread signals stay as they are.

    A signal that comes again changes nothing: launchers and terminals send it to several processes, which pass it on.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def remember(number: int, frame: FrameType | None) -> None:
        request.signal = request.signal or signal.Signals(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
