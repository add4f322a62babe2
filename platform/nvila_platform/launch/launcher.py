"""The interface that every launcher offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol


class Launcher(Protocol):
    """Runs a module in one or more processes that form one torch process group."""

    def run(
        self, module: str, args: Sequence[str], *, num_processes: int, env: Mapping[str, str], log_path: Path
    ) -> None:
        """Run `python -m module args...` to its end.

        Args:
            module: Dotted name of a module with a `__main__` part.
            args: Its command-line arguments.
            num_processes: Size of the process group; RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are
                set in every process.
            env: Variables put over this process's environment, such as `Settings.to_env()`.
            log_path: Gets standard output and error of all processes, appended.

        Raises:
            NvilaError: The module failed; a typed error comes back as it was raised.
            InfrastructureError: A process was killed.
        """
