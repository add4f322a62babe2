"""Work in several processes of this machine, watched from this one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvila_platform.settings import Settings
    from nvila_platform.telemetry import ProgressView


def run_watched(
    module: str, order: Path, *, events: Path, processes: int, threads: int, settings: Settings, view: ProgressView
) -> None:
    """Run a module in several processes and draw what they report.

    Args:
        module: Runs as a program with the path of its order.
        order: What is to be done, a file that the module reads.
        events: Event log that the processes write to; one of an earlier attempt is removed. What they print goes to
            `processes.log` beside it.
        processes: How many.
        threads: Of each.
        settings: Passed on to the processes.
        view: Draws the events.

    Raises:
        NvilaError: What the first process that failed raised.
    """
    from nvila_platform.launch import LocalLauncher
    from nvila_platform.telemetry import follow

    events.unlink(missing_ok=True)
    stop = threading.Event()

    def draw() -> None:
        for event in follow(events, stop.is_set):
            view.show(event)

    thread = threading.Thread(target=draw, name=f"{module}-events", daemon=True)
    thread.start()
    try:
        LocalLauncher().run(
            module,
            [str(order)],
            num_processes=processes,
            env=settings.to_env() | {"OMP_NUM_THREADS": str(threads)},
            log_path=events.with_name("processes.log"),
        )
    finally:
        stop.set()
        thread.join()
