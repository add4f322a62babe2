"""Running the lifecycle in this process: order, plans, what a run leaves, failures. The steps' work stands in."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from nvila.errors import ConfigError, DataError, InfrastructureError, NvilaError
from nvila_pipelines import lifecycle, local_pipeline
from nvila_pipelines.lifecycle import finished_steps, new_run, plan, run_until, steps_before
from nvila_pipelines.local_pipeline import run_compiled
from nvila_pipelines.recipe import Recipe, load_recipe
from nvila_pipelines.steps.context import StepContext
from nvila_pipelines.steps.table import STEPS, StepSpec
from nvila_platform.launch.outcome import leave_error
from nvila_platform.settings import Settings
from nvila_platform.telemetry import Event, ProgressView


@dataclass
class Bridge:
    """Stands in for the tracking of a run."""

    told: list[Event] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    loads: list[int] = field(default_factory=list)

    def __call__(self, run: object, recipe: object) -> Bridge:
        return self

    def add(self, event: Event) -> None:
        self.told.append(event)

    def log_load(self, values: Mapping[str, float], sample: int) -> None:
        self.loads.append(sample)

    def close(self, status: str) -> None:
        self.closed.append(status)


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch) -> Bridge:
    made = Bridge()
    monkeypatch.setattr(lifecycle, "TrackingBridge", made)
    return made


@pytest.fixture
def view() -> ProgressView:
    return ProgressView(Console(file=io.StringIO()), format="json")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make every step write its name, and list which ran."""
    ran: list[str] = []

    def work(context: StepContext) -> dict[str, float]:
        ran.append(context.out_dir.parent.name)
        (context.out_dir / "out.txt").write_text(f"{ran[-1]} {context.recipe.seed}", encoding="utf-8")
        return {"value": 1.0}

    monkeypatch.setattr(StepSpec, "load", lambda self: work)
    return ran


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("data", ["data"]),
        ("train", ["data", "curate", "train"]),
        ("evaluate-wide", ["data", "curate", "train", "evaluate-wide"]),
        ("quantize", ["data", "curate", "train", "quantize"]),
        ("serve", list(STEPS)),
    ],
)
def test_steps_before(step: str, expected: list[str]) -> None:
    assert steps_before(step) == expected


def test_run_until_runs_what_the_step_needs_and_reports_it(
    calls: list[str], bridge: Bridge, micro: Recipe, settings: Settings, view: ProgressView
) -> None:
    ref = run_until(micro, settings, "quantize", view=view)
    assert ref.step == "quantize"
    assert calls == ["data", "curate", "train", "quantize"]
    assert [event.step for event in bridge.told if event.phase == "finished"] == calls
    assert bridge.closed == ["FINISHED"]
    assert bridge.loads[0] == 0
    run_until(micro, settings, "quantize", view=view)
    assert len(calls) == 4
    assert [event.phase for event in bridge.told[-4:]] == ["reused"] * 4


def test_a_failed_step_ends_the_run_as_failed(
    bridge: Bridge, micro: Recipe, settings: Settings, view: ProgressView, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(context: StepContext) -> dict[str, float]:
        raise DataError("broken")

    monkeypatch.setattr(StepSpec, "load", lambda self: fails)
    with pytest.raises(DataError):
        run_until(micro, settings, "data", view=view)
    assert bridge.closed == ["FAILED"]
    assert [event.phase for event in bridge.told] == ["start"]


def test_ctrl_c_ends_the_run_as_killed(
    bridge: Bridge, micro: Recipe, settings: Settings, view: ProgressView, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(context: StepContext) -> dict[str, float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(StepSpec, "load", lambda self: interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_until(micro, settings, "data", view=view)
    assert bridge.closed == ["KILLED"]


def test_an_unknown_step_leaves_nothing(micro: Recipe, settings: Settings, view: ProgressView) -> None:
    with pytest.raises(ConfigError, match="unknown step 'trian'"):
        run_until(micro, settings, "trian", view=view)
    assert not settings.workspace.exists()


def test_a_plan_knows_keys_as_far_as_inputs_exist(
    calls: list[str],
    bridge: Bridge,
    micro: Recipe,
    settings: Settings,
    view: ProgressView,
    change: Callable[..., Recipe],
) -> None:
    first = {step.name: step for step in plan(micro, settings)}
    assert list(first) == list(STEPS)
    assert first["data"].key is not None
    assert all(step.key is None for name, step in first.items() if name != "data")
    assert not any(step.finished for step in first.values())
    run_until(micro, settings, "train", view=view)
    planned = {step.name: step for step in plan(micro, settings)}
    assert [name for name, step in planned.items() if step.finished] == ["data", "curate", "train"]
    assert planned["data"].key == first["data"].key
    assert planned["quantize"].key is not None
    assert planned["gate"].key is None
    other = {step.name: step.finished for step in plan(change("train.precision=fp32"), settings)}
    assert [name for name, finished in other.items() if finished] == ["data", "curate"]


def test_registration_is_never_planned_as_finished(
    calls: list[str], bridge: Bridge, micro: Recipe, settings: Settings, view: ProgressView
) -> None:
    run_until(micro, settings, "serve", view=view)
    finished = {step.name for step in plan(micro, settings) if step.finished}
    assert finished == set(STEPS) - {"register", "serve"}
    assert set(finished_steps(micro, settings)) == finished


def test_a_run_has_a_folder_with_its_recipe(micro: Recipe, settings: Settings) -> None:
    one, two = new_run(micro, settings), new_run(micro, settings)
    assert one.run_id != two.run_id
    assert one.run_id.startswith("micro-")
    assert one.directory == settings.workspace / "runs" / one.run_id
    assert load_recipe(one.directory / "recipe.yaml") == micro
    assert yaml.safe_load((one.directory / "recipe.yaml").read_text(encoding="utf-8")) == micro.to_dict()
    assert one.events_path.read_text(encoding="utf-8") == ""


class Pipeline:
    """Stands in for kfp's local runner: fails like it, or not."""

    def __init__(self, fails: Callable[[], None] | None = None) -> None:
        self.fails = fails
        self.environment: dict[str, str] = {}
        self.arguments: Mapping[str, str] = {}

    def __call__(self, **arguments: str) -> None:
        self.environment, self.arguments = dict(os.environ), arguments
        print("what a task prints")
        if self.fails is not None:
            self.fails()
            raise RuntimeError("Pipeline 'nvila-lifecycle' finished with status FAILURE. Inner task failed: 'train'.")


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    from kfp import components

    made = Pipeline()
    monkeypatch.setattr(components, "load_component_from_file", lambda path: made)
    return made


def run_it(settings: Settings, tmp_path: Path) -> Path:
    settings.workspace.mkdir(parents=True)
    log = settings.workspace / "logs" / "run.log"
    run_compiled(tmp_path / "p.yaml", {"recipe": "{}", "run_id": "r"}, settings, log)
    return log


def test_tasks_get_the_settings_and_their_output_goes_to_the_log(
    pipeline: Pipeline, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run_it(settings, tmp_path)
    assert pipeline.arguments == {"recipe": "{}", "run_id": "r"}
    assert settings.to_env().items() <= pipeline.environment.items()
    assert pipeline.environment["NVILA_RUNNER_PID"] == str(os.getpid())
    assert Path(pipeline.environment["TMPDIR"]).parent == settings.workspace
    assert "what a task prints" in log.read_text(encoding="utf-8")
    assert capsys.readouterr().out == ""
    # Nothing stays behind: no scratch folder, no variable, and this process's own temporary folder is still there.
    assert {path.name for path in settings.workspace.iterdir()} == {"logs"}
    assert not [name for name in os.environ if name.startswith("NVILA_")]
    assert Path(tempfile.gettempdir()).is_dir()


@pytest.mark.parametrize(
    "error",
    [DataError("line 3 is broken", "mend it"), InfrastructureError("train was killed by SIGKILL", "run it again")],
    ids=lambda error: error.code,
)
def test_the_error_of_a_task_comes_back_as_it_was_raised(
    error: NvilaError, pipeline: Pipeline, settings: Settings, tmp_path: Path
) -> None:
    pipeline.fails = lambda: leave_error(error)
    with pytest.raises(type(error)) as failed:
        run_it(settings, tmp_path)
    assert (failed.value.message, failed.value.hint) == (error.message, error.hint)
    assert failed.value.exit_code == error.exit_code


def test_a_task_that_leaves_no_error_points_to_the_log(pipeline: Pipeline, settings: Settings, tmp_path: Path) -> None:
    pipeline.fails = lambda: None
    with pytest.raises(NvilaError, match=r"the pipeline stopped: .*'train'") as failed:
        run_it(settings, tmp_path)
    assert failed.value.hint == f"see {settings.workspace / 'logs' / 'run.log'}"
    assert "\n" not in str(failed.value)


def test_a_typed_error_crosses_kfp(one_task: Callable[[str], Path], settings: Settings) -> None:
    body = (
        "from nvila.errors import DataError; from nvila_platform.launch.outcome import leave_error; import sys; "
        "leave_error(DataError('train.jsonl line 3: no id', 'mend the record')); sys.exit(1)"
    )
    settings.workspace.mkdir(parents=True)
    with pytest.raises(DataError, match=r"train\.jsonl line 3: no id \(mend the record\)"):
        run_compiled(one_task(body), {"recipe": "{}", "run_id": "r"}, settings, settings.workspace / "run.log")


def test_a_task_that_is_killed_is_one_line(one_task: Callable[[str], Path], settings: Settings) -> None:
    body = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    settings.workspace.mkdir(parents=True)
    with pytest.raises(NvilaError, match="the pipeline stopped") as failed:
        run_compiled(one_task(body), {"recipe": "{}", "run_id": "r"}, settings, settings.workspace / "run.log")
    assert "\n" not in str(failed.value)
    assert "run.log" in failed.value.hint


def test_the_environment_comes_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "before")
    with local_pipeline._environment({"KEPT": "inside", "NEW": "inside"}):
        assert (os.environ["KEPT"], os.environ["NEW"]) == ("inside", "inside")
    assert os.environ["KEPT"] == "before"
    assert "NEW" not in os.environ


def test_scratch_folders_of_killed_runs_are_removed_and_those_of_running_ones_stay(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    names = {"dead": ended.pid, "alive": os.getpid(), "init": 1}
    folders = {name: tmp_path / f"{local_pipeline._SCRATCH}{pid}-x" for name, pid in names.items()}
    folders["other machine"] = tmp_path / f".kfp-elsewhere-{ended.pid}-x"
    for folder in folders.values():
        (folder / "root").mkdir(parents=True)
    local_pipeline._remove_leftovers(tmp_path)
    assert {name for name, folder in folders.items() if not folder.exists()} == {"dead"}
