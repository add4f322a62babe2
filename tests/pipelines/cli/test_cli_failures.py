"""How the command fails: one line, the fix, the exit code."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nvila.errors import ConfigError, GateError, InfrastructureError, NvilaError
from nvila_pipelines.cli.failures import extras, guarded

GUARD = """
import argparse, sys
from nvila_pipelines.cli.failures import guarded
args = argparse.Namespace(debug=False, json=False, workspace=None)
def work():
    {body}
    return 0
sys.exit(guarded(work, args))
"""


def fail(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


def arguments(workspace: Path, *, debug: bool = False, as_json: bool = False) -> argparse.Namespace:
    return argparse.Namespace(debug=debug, json=as_json, workspace=workspace)


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (ConfigError("seed is 'x'", "use a number"), 2, ["error: seed is 'x'", "  fix: use a number"]),
        (GateError("refused"), 1, ["error: refused"]),
        (InfrastructureError("down", "try again\nlog: a"), 75, ["error: down", "  fix: try again", "       log: a"]),
        (
            MemoryError(),
            1,
            ["error: the machine ran out of memory", "  fix: close other programs, or use smaller batches"],
        ),
        (
            ModuleNotFoundError("no", name="mlflow.tracking"),
            1,
            ["error: the Python package mlflow is not installed", "  fix: pip install 'nvila[pipelines]'"],
        ),
        (
            ModuleNotFoundError("no", name="PIL"),
            1,
            ["error: the Python package pillow is not installed", "  fix: pip install 'nvila[model]'"],
        ),
        (
            ModuleNotFoundError("no", name="easy_vqa"),
            1,
            ["error: the Python package easy-vqa is not installed", "  fix: pip install 'nvila[quickstart]'"],
        ),
        (
            ModuleNotFoundError("no", name="elsewhere"),
            1,
            ["error: the Python package elsewhere is not installed", "  fix: pip install elsewhere"],
        ),
        (KeyboardInterrupt(), 130, ["", "interrupted: the same command goes on where this one stopped"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_foreseen_failures(
    error: BaseException, code: int, lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(fail(error), arguments(tmp_path)) == code
    captured = capsys.readouterr()
    assert captured.err.splitlines() == lines
    assert captured.out == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_names_the_file(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(fail(OSError(number, "full", "/data/x")), arguments(tmp_path)) == 1
    assert capsys.readouterr().err.splitlines()[0] == "error: no space left while writing /data/x"


def test_refused_write_in_the_workspace_is_a_matter_of_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(errno.EROFS, "Read-only file system", str(tmp_path / "runs"))
    assert guarded(fail(error), arguments(tmp_path)) == 2
    assert "--workspace" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("division by zero\nsecond line"),
        PermissionError(errno.EACCES, "Permission denied", "/elsewhere/file"),
        OSError(errno.EPIPE + 1000, "strange"),
        ModuleNotFoundError("no", name="nvila.gone"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_unforeseen_failure_leaves_its_traceback_in_a_file(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(fail(error), arguments(tmp_path)) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: unexpected {type(error).__name__}")
    log = next((tmp_path / "logs").iterdir())
    assert str(log) in second
    assert "Traceback" in log.read_text(encoding="utf-8")


def test_without_a_workspace_the_traceback_goes_to_the_temporary_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert guarded(fail(ValueError("odd")), arguments(tmp_path / "absent")) == 1
    assert not (tmp_path / "absent").exists()
    (log,) = tmp_path.glob("error-*.log")
    assert str(log) in capsys.readouterr().err


def test_nowhere_to_leave_a_traceback_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert guarded(fail(ValueError("odd")), arguments(tmp_path / "absent")) == 1
    assert "--debug" in capsys.readouterr().err


def test_debug_shows_the_traceback_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(fail(ConfigError("wrong")), arguments(tmp_path, debug=True)) == 2
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert text.endswith("error: wrong\n")


def test_json_gives_machines_the_error_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(fail(ConfigError("wrong", "do")), arguments(tmp_path, as_json=True)) == 2
    found = json.loads(capsys.readouterr().out)
    assert found == {"error": {"code": "config", "message": "wrong", "hint": "do"}, "exit_code": 2}


def test_closed_pipe_is_quiet() -> None:
    code = GUARD.format(body="print('x' * 100000)")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_interrupt_from_the_keyboard_is_one_line() -> None:
    code = GUARD.format(body="print('ready', flush=True); import time; time.sleep(60)")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        text = child.stderr.read()
    assert child.returncode == 130
    assert text.split("\n") == ["", "interrupted: the same command goes on where this one stopped", ""]


def test_every_package_stands_in_one_extra() -> None:
    packages = [package for packages in extras().values() for package in packages]
    assert len(packages) == len(set(packages))
    assert extras()["model"]["torch"]
    assert "torch" not in extras()["quickstart"]
    assert "pydantic" in extras()[""]


def test_errors_of_every_kind_have_their_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in (NvilaError, ConfigError, GateError, InfrastructureError):
        assert guarded(fail(kind("x")), arguments(tmp_path)) == kind.exit_code
    capsys.readouterr()
