"""Executing a compiled pipeline on this machine with kfp's local runner."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from nvila.errors import InfrastructureError, NvilaError
from nvila_pipelines.local_tasks import forking, task_server
from nvila_platform.artifacts import storage_errors
from nvila_platform.launch.outcome import left_error
from nvila_platform.launch.stopping import RunStop, Terminated
from nvila_platform.settings import ERROR_FILE, RUNNER_PID, TASKS_FOLDER, Settings

# The machine is part of the name: process ids of another one that shares the workspace mean nothing here.
_SCRATCH = f".kfp-{socket.gethostname()}-"
_TASK_ENVIRONMENT = {
    # The working folder is not a place to import from: a folder named docker/ would shadow the SDK.
    "PYTHONSAFEPATH": "1",
    # Threads that wait spin for some microseconds and then sleep. The default of milliseconds costs several times the
    # work itself as soon as the machine is busy; not spinning at all costs half the speed when it is idle.
    "GOMP_SPINCOUNT": "20000",
}


def run_compiled(
    package: Path,
    arguments: Mapping[str, Any],
    settings: Settings,
    log_path: Path,
    notice: Callable[[str], None] = lambda _: None,
    keep: Path | None = None,
    imports: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Run a compiled pipeline; every task is a process of its own.

    kfp's own cache is off: steps are reused by content key, which also sees changes of the code, and which checks
    that the files behind a hit are still there and unchanged.

    SIGTERM and SIGINT go on to the running task, whose training saves a checkpoint; this call ends when it has ended.

    Args:
        package: Compiled YAML.
        arguments: Pipeline parameters.
        settings: Handed to the tasks through their environment.
        log_path: File for what kfp and the tasks print.
        notice: Tells the user that a signal came.
        keep: Folder that gets what each task wrote for the Kubeflow UI, also when one fails; None keeps nothing.
        imports: Modules by the name of a component that this task and those behind it need, so that they are imported
            once for all of them.

    Raises:
        NvilaError: A task failed; the task's own error when it left one.
        KeyboardInterrupt: SIGINT came.
        Terminated: SIGTERM came.
    """
    with storage_errors(log_path):
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = log_path.open("a", encoding="utf-8")
        _remove_leftovers(settings.workspace)
        scratch = tempfile.TemporaryDirectory(dir=settings.workspace, prefix=f"{_SCRATCH}{os.getpid()}-")
    error_file = Path(scratch.name) / "error.json"
    environment = settings.to_env() | {ERROR_FILE: str(error_file), RUNNER_PID: str(os.getpid())} | _TASK_ENVIRONMENT
    environment |= {TASKS_FOLDER: scratch.name}
    stop = RunStop(Path(scratch.name), notice)
    # kfp leaves a folder of every task behind in the system's temporary one. This process keeps its own, which Python
    # looks up once: the scratch folder is gone when the run has ended.
    tempfile.gettempdir()
    environment |= {"TMPDIR": scratch.name}
    with log, scratch, _environment(environment), contextlib.redirect_stdout(log), _task_processes(log, imports or {}):
        from kfp import components, local

        local.init(
            runner=local.SubprocessRunner(use_venv=False),
            pipeline_root=str(Path(scratch.name) / "root"),
            workspace_root=str(Path(scratch.name) / "work"),
            enable_caching=False,
            raise_on_error=True,
        )
        pipeline = components.load_component_from_file(str(package))
        try:
            with stop.watching():
                pipeline(**arguments)
            _end_if_asked(stop, None)
        except RuntimeError as e:
            error = left_error(error_file)
            _end_if_asked(stop, None if error is None else error[0])
            if error is not None:
                raise error[0] from e
            raise NvilaError(f"the pipeline stopped: {e}", f"see {log_path}") from e
        finally:
            if keep is not None:
                _keep(Path(scratch.name) / "root", keep)


@contextlib.contextmanager
def _task_processes(log: TextIO, imports: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Import kfp and say how its local runner starts tasks."""
    if sys.platform != "linux":
        # Elsewhere system libraries do not survive a fork.
        yield
        return
    # First, so that it imports while this process does.
    with task_server(log.fileno()) as server:
        import_kfp()
        with forking(server, imports):
            yield


def import_kfp() -> None:
    """Import kfp without its client of a cluster, which takes longer to import than all the rest."""
    # What the package itself imports in a task: nothing. Its modules decide each for itself, when they are imported.
    with _environment({"_KFP_RUNTIME": "true"}):
        import kfp  # noqa: F401


def _keep(root: Path, target: Path) -> None:
    """Move the artifacts of tasks, which kfp files under the name of the pipeline's run."""
    for task in sorted(root.glob("*/*/")):
        with storage_errors(target):
            shutil.copytree(task, target / task.name, dirs_exist_ok=True)


def _end_if_asked(stop: RunStop, error: NvilaError | None) -> None:
    """End as the signal that came asks for; what a task said about its end is told.

    Raises:
        KeyboardInterrupt: SIGINT came.
        Terminated: SIGTERM came.
    """
    if stop.signal is None:
        return
    # A task that was not asked but failed has its own error to tell.
    if error is not None and not isinstance(error, InfrastructureError):
        return
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated("the run was stopped by SIGTERM" if error is None else error.message)


def _remove_leftovers(workspace: Path) -> None:
    """Remove the scratch folders of runs that were killed; their names tell the process."""
    for folder in workspace.glob(f"{_SCRATCH}*"):
        pid = folder.name.removeprefix(_SCRATCH).split("-")[0]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
