"""`nvila run` and the verbs of single steps: recipes, plans, results and refusals. The steps themselves stand in."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvila.errors import InfrastructureError
from nvila_pipelines import lifecycle
from nvila_pipelines.cli import serve
from nvila_pipelines.recipe import Recipe, load_recipe
from nvila_pipelines.summary import Summary
from nvila_platform.artifacts import code_version, content_key, utc_now, write_manifest
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, LocalStore
from nvila_platform.telemetry import ProgressView

Nvila = Callable[..., Any]

SUMMARY = Summary(
    run_id="quickstart-1",
    workspace="/ws",
    seconds=12.5,
    steps={"data": 1.5, "train": 11.0},
    usage={"core_hours": 0.005},
    accuracy={"majority": 0.37, "text_majority": 0.67, "wide": 0.98, "quantized": 0.975},
    served={"asked": 50, "right": 49, "p50_ms": 12.0, "p95_ms": 20.0},
    sizes={},
    model="models:/nvila/3",
    passed=True,
    checks=(),
    recipe={},
    versions={},
    hardware={},
    report="/ws/runs/quickstart-1/report.html",
)


class Calls:
    """Stands in for the lifecycle; keeps what it was asked."""

    def __init__(self) -> None:
        self.recipes: list[Recipe] = []
        self.settings: list[Settings] = []
        self.steps: list[str] = []
        self.served: list[dict[str, Any]] = []
        self.summary = SUMMARY
        self.error: BaseException | None = None

    def run_lifecycle(self, recipe: Recipe, settings: Settings, *, view: ProgressView) -> Summary:
        self.recipes.append(recipe)
        self.settings.append(settings)
        if self.error is not None:
            raise self.error
        return self.summary

    def run_until(self, recipe: Recipe, settings: Settings, step: str, *, view: ProgressView) -> ArtifactRef:
        self.steps.append(step)
        store = LocalStore(Path(settings.store_uri))
        key = content_key(step, {}, {}, "1")
        folder = store.work_dir(step, key)
        (folder / "out.txt").write_text("made", encoding="utf-8")
        write_manifest(
            folder,
            step=step,
            key=key,
            config={},
            inputs={},
            code_version=code_version(),
            started_at=utc_now(),
            metrics={"loss": 0.125, "kept": 17340.0},
        )
        return store.publish(folder)

    def serve_model(self, model: str, settings: Settings, **options: Any) -> None:
        self.served.append({"model": model, **options})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made = Calls()
    monkeypatch.setattr(lifecycle, "run_lifecycle", made.run_lifecycle)
    monkeypatch.setattr(lifecycle, "run_until", made.run_until)
    monkeypatch.setattr(serve, "serve_model", made.serve_model)
    return made


def test_run_takes_recipe_overrides_and_workspace(nvila: Nvila, calls: Calls, tmp_path: Path) -> None:
    done = nvila("run", "quickstart", "--workspace", "ws", "seed=3", "--log-format", "json")
    assert done.code == 0, done.err
    assert calls.recipes == [load_recipe("quickstart", ["seed=3"])]
    assert calls.settings[0].workspace == tmp_path / "ws"
    # So that processes it starts log alike.
    assert calls.settings[0].to_env()["NVILA_LOG_FORMAT"] == "json"


@pytest.mark.parametrize(("words", "name"), [([], "quickstart"), (["--fast"], "fast"), (["fast", "--fast"], "fast")])
def test_recipe_by_default_and_fast(words: list[str], name: str, nvila: Nvila, calls: Calls) -> None:
    assert nvila("run", *words).code == 0
    assert calls.recipes[0].name == name


def test_run_takes_the_path_of_a_recipe(nvila: Nvila, calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("extends: fast\nseed: 9\n", encoding="utf-8")
    assert nvila("run", "own.yaml").code == 0
    assert (calls.recipes[0].name, calls.recipes[0].seed) == ("own", 9)


def test_run_ends_with_a_table_or_with_json(nvila: Nvila, calls: Calls) -> None:
    text = nvila("run").out
    assert "97.5" in text
    assert "nvila ui" in text
    found = nvila("run", "--json").last_json
    assert found["accuracy"] == {"majority": 0.37, "text_majority": 0.67, "wide": 0.98, "quantized": 0.975}
    assert {"run_id", "workspace", "seconds", "steps", "accuracy", "served", "model", "report"} <= set(found)


def test_refused_model_is_exit_code_1_and_is_not_served(nvila: Nvila, calls: Calls) -> None:
    calls.summary = replace(SUMMARY, passed=False, model="", served={})
    done = nvila("run", "--json", "--serve", "--port", "0")
    assert done.code == 1
    assert done.last_json["passed"] is False
    assert done.err.splitlines()[-2:] == [
        "error: the gate refused the model, nothing was registered",
        "  fix: see why in /ws/runs/quickstart-1/report.html",
    ]
    assert not calls.served


def test_serve_leaves_the_registered_model_up(nvila: Nvila, calls: Calls) -> None:
    assert nvila("run", "--serve", "--port", "0", "--json").code == 0
    assert calls.served == [{"model": "models:/nvila/3", "port": 0, "quiet": True}]


def test_port_in_use_is_said_before_the_work(nvila: Nvila, calls: Calls) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = nvila("run", "--serve", "--port", str(port))
    assert done.code == 1
    assert done.err.startswith(f"error: port {port} on 127.0.0.1 is in use\n  fix: ")
    assert not calls.recipes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "error: unknown recipe 'nope'"),
        (["quikstart"], "  fix: did you mean 'quickstart'?"),
        (["sed=1"], "error: unknown recipe field sed\n  fix: did you mean 'seed'?"),
        (["seed=x"], "error: recipe field seed is 'x'\n  fix: expected a valid integer"),
        (["fast", "quickstart"], "error: two recipes are named: fast and quickstart"),
        (["quickstart", "--fast"], "error: --fast is the recipe fast, quickstart is named too"),
        (["--port", "80"], "error: --port is the port of --serve, which is not given"),
        (["--workspace", "file"], "file is a file\n  fix: name a folder with --workspace"),
        (["--workspace", "file/below"], "error: cannot write "),
        (["--workspace", "/proc/nvila"], "/proc/nvila"),
    ],
)
def test_bad_input_is_refused_before_the_work(
    words: list[str], message: str, nvila: Nvila, calls: Calls, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = nvila("run", *words)
    assert done.code in (1, 2)
    assert message in done.err
    assert len(done.err.splitlines()) <= 2
    assert not calls.recipes


def test_workspace_that_is_not_writable_is_refused(
    nvila: Nvila, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Asked of the system rather than tried with a mode: root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    done = nvila("run")
    assert done.code == 2
    assert f"error: workspace {tmp_path / 'nvila-workspace'} cannot be written" in done.err


def test_wrong_environment_is_named(nvila: Nvila, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVILA_LOG_FORMAT", "jsno")
    done = nvila("version")
    assert (done.code, done.err.splitlines()[0]) == (2, "error: NVILA_LOG_FORMAT='jsno' is not a log format")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InfrastructureError("step train was killed by SIGKILL", "run it again"), 75, "error: step train was killed"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: no space left while writing "),
        (KeyboardInterrupt(), 130, "interrupted: the same command goes on"),
    ],
    ids=["infrastructure", "disk", "keyboard"],
)
def test_failure_of_a_step_is_the_exit_code(
    error: BaseException, code: int, line: str, nvila: Nvila, calls: Calls
) -> None:
    calls.error = error
    done = nvila("run")
    assert done.code == code
    assert line in done.err


def test_dry_run_shows_recipe_and_steps_and_runs_nothing(nvila: Nvila, calls: Calls, tmp_path: Path) -> None:
    done = nvila("run", "--dry-run", "seed=3")
    assert done.code == 0
    assert not calls.recipes
    # The whole output is a recipe file: the steps are comments of it.
    assert yaml.safe_load(done.out)["seed"] == 3
    path = tmp_path / "shown.yaml"
    path.write_text(done.out, encoding="utf-8")
    assert load_recipe(path) == load_recipe("quickstart", ["seed=3"])
    steps = [line.split()[1] for line in done.out.splitlines() if line.startswith("# ")]
    assert steps == [
        *("data", "curate", "train", "quantize", "evaluate-wide", "evaluate-quantized"),
        *("gate", "register", "serve"),
    ]
    found = nvila("run", "--dry-run", "--json", "seed=3").last_json
    assert found["recipe"]["seed"] == 3
    assert len(found["steps"][0]["key"]) == 64
    assert found["steps"][1] == {"name": "curate", "key": None, "finished": False}


@pytest.mark.parametrize(
    ("words", "step"),
    [
        (["curate"], "curate"),
        (["train", "--fast", "seed=1"], "train"),
        (["quantize"], "quantize"),
        (["evaluate"], "evaluate-quantized"),
        (["evaluate", "--model", "wide"], "evaluate-wide"),
    ],
)
def test_verb_of_a_step_says_where_its_artifact_is(words: list[str], step: str, nvila: Nvila, calls: Calls) -> None:
    done = nvila(*words)
    assert done.code == 0, done.err
    assert calls.steps == [step]
    first, *metrics = done.out.splitlines()
    name, _, path = first.partition(": ")
    assert name == step
    assert (Path(path) / "out.txt").read_text(encoding="utf-8") == "made"
    assert metrics == ["  kept  17340", "  loss  0.125"] or metrics == ["  loss  0.125", "  kept  17340"]
    found = nvila(*words, "--json").last_json
    assert (found["step"], found["path"]) == (step, path)
    assert found["metrics"] == {"loss": 0.125, "kept": 17340.0}
    assert len(found["digest"]) == 64
