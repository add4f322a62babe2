"""Tasks of kfp's local runner as forks of one process that has imported kfp's executor and our steps.

kfp starts a shell and a new interpreter for each task, which imports the same modules again; most of the time of a run
that finds its steps done went there. What a task executes is unchanged: the source of the component from the compiled
graph, with kfp's own executor, in a process of its own.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nvila_platform.artifacts import code_version
from nvila_platform.launch.fork_server import ForkServer, Work

# With it kfp leaves out all that only compiling needs.
_RUNTIME = {"_KFP_RUNTIME": "true"}
_IMPORTS = (
    "kfp.dsl.executor_main",
    "nvila_pipelines.report.confusion",
    "nvila_pipelines.report.kubeflow",
    "nvila_pipelines.steps.check",
    "nvila_pipelines.steps.finish",
    "nvila_pipelines.steps.gate",
)
# The shell command of a component that is a Python function, with its source as $0.
_SCRIPT = """
program_path=$(mktemp -d)
printf "%s" "$0" > "$program_path/ephemeral_component.py"
_KFP_RUNTIME=true python3 -m kfp.dsl.executor_main --component_module_path "$program_path/ephemeral_component.py" "$@"
"""
_FUNCTION = "--function_to_execute"


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionTask:
    """A task that is a Python function.

    Args:
        source: Of the component.
        arguments: Of kfp's executor.
    """

    source: str
    arguments: Sequence[str]

    @property
    def function(self) -> str:
        """Name of the function."""
        return self.arguments[self.arguments.index(_FUNCTION) + 1]


def function_task(command: Sequence[str]) -> FunctionTask | None:
    """Read the command that kfp would start; None for one of another form."""
    if len(command) < 4 or list(command[:2]) not in (["sh", "-c"], ["sh", "-ec"]):
        return None
    script, source, *arguments = command[2:]
    if script.replace(sys.executable, "python3").split() != _SCRIPT.split() or _FUNCTION not in arguments[:-1]:
        return None
    return FunctionTask(source=source, arguments=tuple(arguments))


def task_server(output: int) -> ForkServer:
    """Return what tasks are forked from.

    Args:
        output: Descriptor of the run's log.
    """
    return ForkServer(f"{__name__}:prepare", output, dict(os.environ) | _RUNTIME)


def prepare() -> None:
    """Do what every task would do first: import what all have, and read the sources for the version of the code."""
    for module in _IMPORTS:
        importlib.import_module(module)
    code_version()


@contextmanager
def forking(server: ForkServer, imports: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Let kfp's local runner fork its tasks.

    kfp has no place to say so: its function that starts a process is replaced. A command of another form, or one with
    an environment of its own, which modules may read when they are imported, is started as kfp does it.

    Args:
        server: What they are forked from.
        imports: What it imports before a task, by the name of the component.
    """
    from kfp.local import subprocess_task_handler

    start = subprocess_task_handler.run_local_subprocess

    def run(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        task = function_task(full_command)
        if task is None or env_vars:
            return int(start(full_command, env_vars))
        work = Work(
            entry=f"{__name__}:execute",
            arguments={"source": task.source, "arguments": task.arguments},
            environment=dict(os.environ) | _RUNTIME,
            imports=imports.get(task.function, ()),
        )
        # Through `print`, which kfp replaces to indent what tasks write.
        code = server.run(work, lambda line: print(line, end=""))
        print("\n")
        return code

    subprocess_task_handler.run_local_subprocess = run
    try:
        yield
    finally:
        subprocess_task_handler.run_local_subprocess = start


def execute(source: str, arguments: Sequence[str]) -> None:
    """Do what the shell command of a task does."""
    from kfp.dsl.executor_main import executor_main

    program = Path(tempfile.mkdtemp()) / "ephemeral_component.py"
    program.write_text(source, encoding="utf-8")
    sys.argv = [executor_main.__module__, "--component_module_path", str(program), *arguments]
    executor_main()
