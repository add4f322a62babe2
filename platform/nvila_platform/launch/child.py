"""The process that a launcher starts: runs a module, dies with its parent, hands typed errors back.

A wrapper and not a `preexec_fn`: between fork and exec no Python code is safe while other threads run, and the
launching process has such threads.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import runpy
import select
import signal
import sys
import threading
from collections.abc import Sequence

from nvila.errors import NvilaError
from nvila_platform.launch.outcome import KILLED, killed_error, leave_error

_PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str]) -> None:
    """Run a module as `__main__` with a parent to die with.

    Args:
        argv: Process id of the parent (0 when unknown), name of the signal to get when it dies, module, and the
            module's own arguments, which are passed on untouched.

    Raises:
        SystemExit: The module raised a typed error, or ended by itself with a code.
    """
    parent, death_signal, module, *args = argv
    die_with_parent(signal.Signals[death_signal], int(parent))
    collect_rarely()
    sys.argv = [module, *args]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except NvilaError as e:
        leave_error(e)
        raise SystemExit(e.exit_code) from e
    except Exception as e:
        killed = _killed_worker(e)
        if killed is not None:
            leave_error(killed, KILLED)
        raise


def collect_rarely() -> None:
    """Let the garbage collector look at new objects less often, and at none when the process ends.

    A step allocates objects that stay (modules, samples, token ids). The default threshold of 700 new objects rescans
    them all the time, a fifth of the start of a process; the collection of everything at the end takes a second more.
    """
    gc.set_threshold(100_000, 20, 100)
    atexit.register(gc.freeze)


def die_with_parent(death_signal: signal.Signals, parent: int) -> None:
    """Ask the kernel for a signal when the parent dies; end at once when it is dead already.

    Args:
        death_signal: What this process gets.
        parent: Expected parent, or 0 to skip the check for one that died before this call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
    if parent and os.getppid() != parent:
        raise SystemExit(f"the launching process {parent} is gone")


def die_with(pid: int) -> None:
    """End this process by SIGKILL as soon as another one, not necessarily its parent, is gone.

    Args:
        pid: The other process. Where the system offers no way to wait for it, nothing happens.

    Raises:
        SystemExit: It is gone already.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        raise SystemExit(f"the process {pid} is gone") from None
    except (AttributeError, OSError):
        return
    threading.Thread(target=_end_after, args=(descriptor,), name="die-with", daemon=True).start()


def _end_after(descriptor: int) -> None:
    # Readable once the process has ended.
    select.select([descriptor], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_worker(error: Exception) -> NvilaError | None:
    # torchrun's ChildFailedError, recognised by shape: this module must start without importing torch.
    failures = getattr(error, "failures", None)
    if type(error).__name__ != "ChildFailedError" or not isinstance(failures, dict):
        return None
    codes = {rank: int(failure.exitcode) for rank, failure in failures.items()}
    # SIGTERM is how torchrun itself stops the ranks that outlive a failed one.
    for rank, code in sorted(codes.items(), key=lambda item: item[1] == -signal.SIGTERM):
        if code < 0:
            return killed_error(f"rank {rank}", -code)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
