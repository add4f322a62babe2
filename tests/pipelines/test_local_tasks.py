"""Tasks of kfp's local runner are forked, and a task whose step is done imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvila.errors import DataError, InfrastructureError
from nvila_pipelines import lifecycle
from nvila_pipelines.compile import GRAPHS, shipped
from nvila_pipelines.lifecycle import shared_imports
from nvila_pipelines.local_pipeline import run_compiled
from nvila_pipelines.local_tasks import _RUNTIME, function_task
from nvila_pipelines.recipe import Recipe
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef

HEAVY = {"torch", "transformers", "mlflow", "matplotlib", "numpy", "pyarrow", "kubernetes", "duckdb", "nvila.assembly"}


def commands() -> list[tuple[str, list[str]]]:
    """What every task of every graph starts."""
    found = []
    for graph in GRAPHS:
        spec = next(iter(yaml.safe_load_all(shipped(graph).read_text(encoding="utf-8"))))
        for executor in spec["deploymentSpec"]["executors"].values():
            container = executor["container"]
            found.append((graph, [*container["command"], *container["args"]]))
    return found


@pytest.mark.parametrize(("graph", "command"), commands())
def test_the_command_of_every_task_is_understood(graph: str, command: list[str]) -> None:
    # As kfp's runner does before it starts one.
    task = function_task(
        [word.replace("python3", sys.executable) if number != 3 else word for number, word in enumerate(command)]
    )
    assert task is not None
    assert f"def {task.function}(" in task.source
    assert list(task.arguments) == command[4:]


@pytest.mark.parametrize(
    "command",
    [
        ["python3", "train.py"],
        ["sh", "-c", "echo $0", "source", "--function_to_execute", "f"],
        [*commands()[0][1][:2], commands()[0][1][2] + "\nrm -r /\n", *commands()[0][1][3:]],
        commands()[0][1][:4],
    ],
    ids=["program", "script", "longer", "no-function"],
)
def test_another_command_is_left_to_kfp(command: list[str]) -> None:
    assert function_task(command) is None


WHO = (
    "import os, sys; from pathlib import Path; "
    "parent = Path(f'/proc/{os.getppid()}/cmdline').read_text().split(chr(0)); "
    "name = parent[2] if len(parent) > 2 else parent; "
    "print('started by', name, 'in', os.environ['NVILA_WORKSPACE'], 'as', __name__); "
    "print('given', os.environ.get('GIVEN'))"
)


def run_and_read(package: Path, settings: Settings) -> str:
    settings.workspace.mkdir(parents=True, exist_ok=True)
    log = settings.workspace / "run.log"
    run_compiled(package, {"recipe": "{}", "run_id": "r"}, settings, log)
    return log.read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="tasks are forked on Linux alone")
def test_kfp_forks_its_tasks_and_is_left_as_it_was(one_task: Callable[[str], Path], settings: Settings) -> None:
    from kfp.local import subprocess_task_handler

    before = subprocess_task_handler.run_local_subprocess
    log = run_and_read(one_task(WHO), settings)
    assert f"    started by nvila_platform.launch.fork_server in {settings.workspace} as ephemeral_component\n" in log
    assert subprocess_task_handler.run_local_subprocess is before
    assert [path.name for path in settings.workspace.iterdir()] == ["run.log"]


def test_a_task_with_variables_of_its_own_is_started_as_kfp_does_it(
    one_task: Callable[[str], Path], settings: Settings
) -> None:
    package = one_task(WHO)
    spec = yaml.safe_load(package.read_text(encoding="utf-8"))
    (executor,) = spec["deploymentSpec"]["executors"].values()
    executor["container"]["env"] = [{"name": "GIVEN", "value": "by the profile"}]
    package.write_text(yaml.safe_dump(spec), encoding="utf-8")
    log = run_and_read(package, settings)
    assert "given by the profile" in log
    assert "fork_server" not in log


def imported_after(code: str, **variables: str) -> set[str]:
    """The heavy modules that a new process has after it ran code."""
    told = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        env=dict(os.environ) | variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return HEAVY & set(told.stdout.split())


def test_what_tasks_are_forked_from_has_nothing_heavy() -> None:
    assert imported_after("from nvila_pipelines.local_tasks import prepare; prepare()", **_RUNTIME) == set()


def test_the_command_reaches_the_first_task_without_anything_heavy() -> None:
    code = (
        "from nvila_pipelines.cli import main; import nvila_pipelines.lifecycle\n"
        "from nvila_pipelines.local_pipeline import import_kfp; import_kfp()\n"
        "from kfp import components, dsl, local"
    )
    assert imported_after(code) == set()


def test_the_client_of_a_cluster_is_there_when_it_is_asked_for() -> None:
    code = "from nvila_pipelines.local_pipeline import import_kfp; import_kfp()\nfrom kfp import client; client.Client"
    assert "kubernetes" in imported_after(code)


REUSED = """
import os, sys
from pathlib import Path
from nvila_pipelines.recipe import load_recipe
from nvila_pipelines.steps.component import run_component
from nvila_pipelines.local_tasks import prepare

class Result:
    def __init__(self, name):
        self.path, self.metadata = str(Path(sys.argv[2]) / name), {}

prepare()
recipe = load_recipe(Path(sys.argv[1])).to_json()
run_component("data", recipe, sys.argv[3], {}, Result("result"), Result("metrics"), Result("report"))
print(*sys.modules)
"""


def test_a_task_whose_step_is_done_imports_nothing_heavy(settings: Settings, tmp_path: Path) -> None:
    micro = Path(__file__).resolve().parents[1] / "fixtures" / "micro.yaml"
    env = {name: value for name, value in os.environ.items() if not name.startswith("NVILA_")} | settings.to_env()
    env |= {"NVILA_RUNNER_PID": str(os.getpid()), **_RUNTIME}
    told = []
    for run in ("first", "second"):
        command = [sys.executable, "-c", REUSED, str(micro), str(tmp_path), run]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        told.append(HEAVY & set(done.stdout.split()))
    assert "pyarrow" in told[0]
    assert told[1] == set()


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}
    monkeypatch.setattr(lifecycle, "finished_steps", lambda recipe, settings: found)
    monkeypatch.setattr(lifecycle, "_GPU_DEVICES", ())
    return found


def test_what_steps_compute_with_is_imported_for_those_that_are_not_done(
    finished: dict[str, Any], micro: Recipe, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = ArtifactRef(step="x", key="0" * 64, digest="d" * 64, uri="")
    assert set(shared_imports(micro, settings)) == {"curate", "quantize", "evaluate"}
    finished |= dict.fromkeys(("data", "curate", "train", "evaluate-wide"), ref)
    assert set(shared_imports(micro, settings)) == {"quantize", "evaluate"}
    finished |= dict.fromkeys(("quantize", "evaluate-quantized"), ref)
    assert shared_imports(micro, settings) == {}
    finished.clear()
    # No fork follows what a driver does.
    monkeypatch.setattr(lifecycle, "_GPU_DEVICES", ("null",))
    assert shared_imports(micro, settings) == {}


def test_a_store_that_is_away_is_for_the_steps_to_report(
    finished: dict[str, Any], micro: Recipe, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(recipe: Recipe, settings: Settings) -> dict[str, Any]:
        raise InfrastructureError("S3 is away")

    monkeypatch.setattr(lifecycle, "finished_steps", away)
    assert set(shared_imports(micro, settings)) == {"curate", "quantize", "evaluate"}


def test_a_task_has_what_was_imported_for_it(one_task: Callable[[str], Path], settings: Settings) -> None:
    settings.workspace.mkdir(parents=True)
    body = (
        "import sys; from nvila.errors import DataError; from nvila_platform.launch.outcome import leave_error; "
        "leave_error(DataError(str('sqlite3' in sys.modules))); sys.exit(1)"
    )
    for imports, has in ({}, "False"), ({"task": ("sqlite3",)}, "True"), ({"other": ("sqlite3",)}, "False"):
        with pytest.raises(DataError, match=has):
            run_compiled(
                one_task(body), {"recipe": "{}", "run_id": "r"}, settings, settings.workspace / "log", imports=imports
            )
