"""How a launched process tells its launcher why it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

from nvila.errors import InfrastructureError, NvilaError, error_from_dict
from nvila_platform.settings import error_file

RAISED = "raised"
KILLED = "killed"


def leave_error(error: NvilaError, cause: str = RAISED) -> None:
    """Leave an error for the launcher; the first of several processes wins, the rest only followed it down."""
    sys.stderr.write(f"{type(error).__name__}: {error}\n")
    path = error_file()
    if path is None:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # The error is on standard error already; a full disk must not replace it with another one.
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(error.to_dict() | {"cause": cause}), encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
        temporary.unlink()


def left_error(path: Path) -> tuple[NvilaError, str] | None:
    """Return the error that a process left and how it came about, or None when it left none."""
    try:
        left = json.loads(path.read_text(encoding="utf-8"))
        return error_from_dict(left), str(left["cause"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def killed_error(what: str, number: int) -> InfrastructureError:
    """Describe a process that was ended by a signal."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    cause = "often: out of memory; " if number == signal.SIGKILL else ""
    return InfrastructureError(f"{what} was killed by {name}", f"{cause}run it again to resume")
