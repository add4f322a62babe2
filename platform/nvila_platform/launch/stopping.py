"""Ending on request: SIGTERM or Ctrl-C to a command reaches the tasks of its pipeline, which save what they have.

The local pipeline runner starts tasks through a shell, which passes no signal on. So tasks write their process ids into
a folder of the run, and the command sends them the signal itself and waits for their end.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

# Kubernetes gives 30 seconds before it kills; what is left is for the command's own end.
GRACE_S = 26.0
_STOP = "stop"
_TASK = "task-"
GO_ON = "run the same command again to go on"


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Leaves everything behind as Ctrl-C does, and ends in the exit code of what may be tried again."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` when SIGTERM comes, instead of ending without cleaning up."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated("stopped by SIGTERM")

    with _handling({signal.SIGTERM: terminate}):
        yield


@contextmanager
def stoppable_task(folder: Path | None) -> Iterator[None]:
    """Be a task that the command in charge can end.

    Args:
        folder: Where tasks of the run are listed; None for a task that no command on this machine is in charge of.

    Raises:
        Terminated: SIGTERM comes, or the run was asked to end before this task started.
    """
    if folder is None:
        with terminable():
            yield
        return
    listed = folder / f"{_TASK}{os.getpid()}"
    # A terminal sends Ctrl-C to tasks too. The command answers it, so that what a task does is not cut in the middle.
    with terminable(), _handling({signal.SIGINT: lambda *_: None}):
        listed.touch()
        try:
            # In this order: a run that is asked to end leaves its mark first and then looks for tasks.
            if (folder / _STOP).exists():
                raise Terminated("the run was stopped before this task started")
            yield
        finally:
            listed.unlink(missing_ok=True)


class RunStop:
    """Whether a run was asked to end, and by what.

    Args:
        folder: Where its tasks are listed.
        notice: Tells the user what is going on.
    """

    def __init__(self, folder: Path, notice: Callable[[str], None]) -> None:
        self.signal: signal.Signals | None = None
        self._folder = folder
        self._notice = notice
        self._kill = threading.Timer(GRACE_S, self._signal_tasks, [signal.SIGKILL])
        self._kill.daemon = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Pass SIGTERM and SIGINT on to the tasks; elsewhere than in the main thread signals stay as they are."""
        try:
            with _handling({signal.SIGTERM: self._ask, signal.SIGINT: self._ask}):
                yield
        finally:
            self._kill.cancel()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            with suppress(OSError):
                (self._folder / _STOP).touch()
            self._notice(
                f"{self.signal.name}: the running step saves what it has, then this command ends "
                f"(at most {GRACE_S:.0f} seconds; Ctrl-C once more: at once)"
            )
            self._signal_tasks(signal.SIGTERM)
            self._kill.start()
        elif number == signal.SIGINT:
            self._signal_tasks(signal.SIGKILL)

    def _signal_tasks(self, number: signal.Signals) -> None:
        for listed in self._folder.glob(f"{_TASK}*"):
            with suppress(ProcessLookupError):
                os.kill(int(listed.name.removeprefix(_TASK)), number)


@contextmanager
def _handling(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
