"""Temporary folders that are taken away even when their process is killed: the next one of its kind does it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A folder is made a moment before it is locked, and by older releases never.
_ABANDONED_S = 3600.0


@contextmanager
def scratch_folder(kind: str) -> Iterator[Path]:
    """Make a folder for the time of a `with` block, and remove those that killed processes have left.

    Whoever uses one holds a lock on it, which the kernel takes back whatever ends the process.

    Args:
        kind: What its name begins with.

    Yields:
        The folder, empty.
    """
    _sweep(kind)
    with tempfile.TemporaryDirectory(prefix=f"{kind}-") as name:
        lock = os.open(name, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(lock)


def _sweep(kind: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{kind}-*"):
        # Another user's, another process's that sweeps too, or one in use: theirs to remove.
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                found = os.fstat(lock)
                if found.st_uid == os.getuid() and time.time() - found.st_mtime > _ABANDONED_S:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
