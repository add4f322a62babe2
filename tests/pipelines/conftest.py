"""The command in this process, the micro recipe, a workspace, and one run for tests that only look at its results."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nvila_pipelines.cli import main
from nvila_pipelines.lifecycle import new_run
from nvila_pipelines.recipe import Recipe, load_recipe
from nvila_pipelines.steps.context import StepContext
from nvila_pipelines.steps.runner import RunContext
from nvila_pipelines.steps.table import step_spec
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef
from nvila_platform.telemetry import Event, parse_event

MICRO = Path(__file__).resolve().parents[1] / "fixtures" / "micro.yaml"


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's settings out, and threads from fighting over the cores of a busy machine."""
    for name in [name for name in os.environ if name.startswith("NVILA_") or name == "MLFLOW_RUN_ID"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


@dataclass(frozen=True)
class Outcome:
    """What one command line did."""

    code: int
    out: str
    err: str

    @property
    def last_json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


Nvila = Callable[..., Outcome]


@pytest.fixture
def nvila(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Nvila:
    """Run the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def micro() -> Recipe:
    return load_recipe(MICRO)


@pytest.fixture
def change() -> Callable[..., Recipe]:
    """Load the micro recipe with overrides."""

    def load(*overrides: str) -> Recipe:
        return load_recipe(MICRO, overrides)

    return load


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.load(tmp_path / "work space", {})


@pytest.fixture
def new_context(settings: Settings, micro: Recipe) -> Callable[[], RunContext]:
    """Start another run in the workspace."""
    return lambda: new_run(micro, settings)


@pytest.fixture
def events() -> Callable[[RunContext], list[Event]]:
    """Read a run's event log."""

    def read(run: RunContext) -> list[Event]:
        lines = run.events_path.read_text(encoding="utf-8").splitlines()
        return [event for line in lines if (event := parse_event(line)) is not None]

    return read


class SilentNotices:
    """A reporter that keeps the notices."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def progress(self, phase: str, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        """Nothing to keep."""

    def notice(self, text: str) -> None:
        self.notices.append(text)


class Watched:
    """A recipe, or a section of one, that refuses to be read outside the fields that a row of the table names.

    Methods of the real class run on this view, so that what they read counts as read by the step.
    """

    def __init__(self, target: object, allowed: tuple[str, ...], path: str = "") -> None:
        self._target, self._allowed, self._path = target, allowed, path

    def __getattr__(self, name: str) -> Any:
        if name not in getattr(type(self._target), "model_fields", {}):
            member = getattr(type(self._target), name)
            getter = member.fget if isinstance(member, property) else None
            return getter(self) if getter is not None else member.__get__(self)
        # The section `register` is a field of another name: pydantic has a method of this one.
        plain = "register" if name == "registration" else name
        field = f"{self._path}.{plain}" if self._path else plain
        if any(field == given or field.startswith(f"{given}.") for given in self._allowed):
            return getattr(self._target, name)
        if any(given.startswith(f"{field}.") for given in self._allowed):
            return Watched(getattr(self._target, name), self._allowed, field)
        raise AssertionError(f"reads {field}, which is not in its row of the table")


@pytest.fixture
def watched() -> Callable[[Recipe, str], Any]:
    """Make the view of a recipe that a step may have."""
    return lambda recipe, step: Watched(recipe, step_spec(step).sections)


class Bench:
    """Runs step functions alone, on directories that a test made."""

    def __init__(self, recipe: Recipe, settings: Settings, root: Path) -> None:
        self.recipe = recipe
        self.settings = settings
        self.root = root
        self.reporter = SilentNotices()

    def context(self, step: str, inputs: Mapping[str, Path], **changed: Any) -> StepContext:
        out_dir = self.root / step
        out_dir.mkdir(parents=True, exist_ok=True)
        values: dict[str, Any] = {
            "inputs": inputs,
            "refs": {name: ArtifactRef(step=name, key="0" * 64, digest="d" * 64, uri="") for name in inputs},
            "recipe": Watched(self.recipe, step_spec(step).sections),
            "options": step_spec(step).options,
            "out_dir": out_dir,
            "log_path": self.root / f"{step}.log",
            "events_path": self.root / "events.jsonl",
            "reporter": self.reporter,
            "settings": self.settings,
            "tracking_run": None,
        }
        return StepContext(**(values | changed))

    def run(self, step: str, inputs: Mapping[str, Path] | None = None, **changed: Any) -> tuple[dict[str, float], Path]:
        context = self.context(step, inputs or {}, **changed)
        return step_spec(step).load()(context), context.out_dir


@pytest.fixture
def bench(micro: Recipe, settings: Settings, tmp_path: Path) -> Bench:
    return Bench(micro, settings, tmp_path / "bench")


@pytest.fixture(scope="session")
def data_dir(micro: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of the micro recipe, made once."""
    root = tmp_path_factory.mktemp("data")
    return Bench(micro, Settings.load(root, {}), root).run("data")[1]


@pytest.fixture(scope="session")
def bench_class() -> type[Bench]:
    """The class of `bench`, for fixtures that live longer than one test."""
    return Bench


class Result:
    """An output artifact of Kubeflow, as far as steps know one."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.metadata: dict[str, Any] = {}


@pytest.fixture
def task(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """This process, as a task of a run; its parent is not watched."""
    for name, value in settings.to_env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("nvila_pipelines.steps.component.die_with_parent", lambda *_: None)
    monkeypatch.setattr("nvila_pipelines.steps.component.die_with", lambda _: None)
    monkeypatch.setenv("NVILA_RUNNER_PID", str(os.getpid()))
    return settings


@pytest.fixture
def one_task(tmp_path: Path) -> Callable[[str], Path]:
    """Compile a pipeline of one task with the body of a step; kfp's real local runner executes it."""

    def make(body: str) -> Path:
        module = tmp_path / "one_task_pipeline.py"
        module.write_text(
            "from kfp import dsl\n\n"
            "@dsl.component(base_image='python:3', install_kfp_package=False)\n"
            f"def task(recipe: str, run_id: str):\n    {body}\n\n"
            "@dsl.pipeline(name='one-task')\n"
            "def pipeline(recipe: str, run_id: str):\n    task(recipe=recipe, run_id=run_id)\n",
            encoding="utf-8",
        )
        from kfp import compiler

        spec = importlib.util.spec_from_file_location("one_task_pipeline", module)
        assert spec is not None
        assert spec.loader is not None
        loaded: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        compiler.Compiler().compile(loaded.pipeline, str(tmp_path / "one.yaml"))
        return tmp_path / "one.yaml"

    return make
