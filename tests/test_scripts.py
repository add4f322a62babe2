"""The scripts behind make: environment set-up and generated documents; and the shared pytest switches."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import check_docs
import pytest
import setup_venv

ROOT = Path(__file__).resolve().parents[1]


class FakeInstaller:
    """Stands for `python -m venv` and pip, which need minutes: makes a working .venv and counts what was asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.die_in = ""

    def create(self, venv: Path) -> None:
        self.calls.append("create")
        (venv / "bin").mkdir(parents=True)
        # A script rather than a link: a linked interpreter would look for its libraries beside the link.
        (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (venv / "bin" / "python").chmod(0o755)
        if self.die_in == "create":
            raise KeyboardInterrupt

    def install(self, root: Path, venv: Path) -> None:
        self.calls.append("install")
        if self.die_in == "install":
            raise KeyboardInterrupt


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text("a==1\n")
    return tmp_path


@pytest.fixture
def fake() -> FakeInstaller:
    return FakeInstaller()


def ensure(root: Path, fake: FakeInstaller) -> str:
    fake.calls.clear()
    return str(setup_venv.ensure(root, fake.create, fake.install))


def test_setup_installs_once(checkout: Path, fake: FakeInstaller) -> None:
    assert ensure(checkout, fake) == "rebuilt"
    assert fake.calls == ["create", "install"]
    assert ensure(checkout, fake) == "ready"
    assert fake.calls == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_setup_installs_again_when_an_input_changes(checkout: Path, fake: FakeInstaller, name: str) -> None:
    ensure(checkout, fake)
    (checkout / name).write_text("changed\n")
    assert ensure(checkout, fake) == "installed"
    assert fake.calls == ["install"]


@pytest.mark.parametrize("moment", ["create", "install"])
def test_setup_starts_over_after_an_interruption(
    checkout: Path, fake: FakeInstaller, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    fake.die_in = moment
    with pytest.raises(KeyboardInterrupt):
        ensure(checkout, fake)
    fake.die_in = ""
    assert ensure(checkout, fake) == "rebuilt"
    assert fake.calls == ["create", "install"]
    assert "the last install was interrupted" in capsys.readouterr().err


def test_setup_repairs_an_environment_whose_python_is_gone(checkout: Path, fake: FakeInstaller) -> None:
    ensure(checkout, fake)
    (checkout / ".venv/bin/python").unlink()
    assert ensure(checkout, fake) == "rebuilt"


def test_setup_replaces_a_file_in_the_way(checkout: Path, fake: FakeInstaller) -> None:
    (checkout / ".venv").write_text("")
    assert ensure(checkout, fake) == "rebuilt"


def test_setup_rebuilds_after_the_checkout_moved(checkout: Path, fake: FakeInstaller, tmp_path: Path) -> None:
    ensure(checkout, fake)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("pyproject.toml", "constraints.txt", ".venv"):
        shutil.move(checkout / name, moved / name)
    assert ensure(moved, fake) == "rebuilt"


def test_setup_waits_for_another_make(checkout: Path, fake: FakeInstaller) -> None:
    entered, release = threading.Event(), threading.Event()
    outcomes: list[str] = []

    class Slow(FakeInstaller):
        def install(self, root: Path, venv: Path) -> None:
            entered.set()
            assert release.wait(10)

    first = threading.Thread(target=lambda: outcomes.append(ensure(checkout, Slow())))
    second = threading.Thread(target=lambda: outcomes.append(ensure(checkout, fake)))
    first.start()
    assert entered.wait(10)
    second.start()
    second.join(0.3)
    assert second.is_alive()
    release.set()
    first.join(10)
    second.join(10)
    assert outcomes == ["rebuilt", "ready"]
    assert fake.calls == []


def test_setup_reports_a_failing_pip_with_its_last_lines(checkout: Path, fake: FakeInstaller) -> None:
    fake.create(checkout / ".venv")
    pip = checkout / ".venv/bin/python"
    pip.write_text("#!/bin/sh\necho 'ERROR: no matching distribution for nothing'\nexit 1\n")
    with pytest.raises(setup_venv.SetupError, match="no matching distribution for nothing"):
        setup_venv._install(checkout, checkout / ".venv")
    assert "no matching distribution" in (checkout / ".venv/install.log").read_text()


def test_make_names_the_fix_for_a_missing_python() -> None:
    done = subprocess.run(["make", "PYTHON=no-such-python", "test"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed, no-such-python is missing; name another one" in done.stderr


def test_make_names_the_fix_for_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(["make", f"PYTHON={old}", "demo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "is Python 3.9.2; name another one: make PYTHON=/path/to/python3.12 demo" in done.stderr


def claim(**changes: Any) -> dict[str, Any]:
    base = {"id": "a", "what": "faster | better", "ratio": 1.23456, "low": 1.0, "high": 1.5}
    return {**base, "goal": ">= 2", "met": False, "notes": "two cores", **changes}


def write_result(root: Path, **changes: Any) -> None:
    result = {"command": "python b.py", "date": "2026-11-22", "versions": {"torch": "2.13.0"}, "hardware": "2 cores"}
    folder = root / "benchmarks/results"
    folder.mkdir(parents=True)
    (folder / "area-name.json").write_text(json.dumps({**result, "claims": [claim()], **changes}))


def test_benchmarks_page_shows_an_unmet_claim(tmp_path: Path) -> None:
    write_result(tmp_path)
    page = check_docs.benchmarks_page(tmp_path / "benchmarks/results")
    assert "| faster \\| better | 1.235 | 1 - 1.5 | >= 2 | **no** | two cores |" in page
    assert "torch 2.13.0" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"claims": [{"id": "x"}]}, "area-name.json: claim x lacks what"),
        ({"claims": []}, ""),
    ],
    ids=["claim lacks keys", "no claims"],
)
def test_benchmarks_page_names_the_bad_file(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_result(tmp_path, **changes)
    if not message:
        assert "area-name" in check_docs.benchmarks_page(tmp_path / "benchmarks/results")
        return
    with pytest.raises(check_docs.SourceError, match=message):
        check_docs.benchmarks_page(tmp_path / "benchmarks/results")


def test_stale_page_fails_the_check_until_it_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_result(tmp_path)
    arguments = ["--root", str(tmp_path)]
    assert check_docs.main([*arguments, "--check"]) == 1
    assert "docs/benchmarks.md is stale; regenerate it with: make docs" in capsys.readouterr().out
    assert check_docs.main([*arguments, "--write"]) == 0
    assert check_docs.main([*arguments, "--check"]) == 0


def test_damaged_result_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_result(tmp_path)
    (tmp_path / "benchmarks/results/area-name.json").write_text("{")
    assert check_docs.main(["--root", str(tmp_path), "--check"]) == 1
    assert capsys.readouterr().err.startswith("docs: area-name.json is not JSON")


def test_cli_page_lists_verbs_arguments_and_defaults() -> None:
    parser = argparse.ArgumentParser(prog="nvila", description="All of it.")
    verbs = parser.add_subparsers()
    run = verbs.add_parser("run", description="Run a recipe.")
    run.add_argument("recipe", nargs="?", default="quickstart", help="name or path")
    run.add_argument("overrides", nargs="*", help="key=value")
    run.add_argument("-f", "--fast", action="store_true", help="100%% quick")
    run.add_argument("--format", choices=["a", "b"], default="a", help="a|b (default: %(default)s)")
    run.add_argument("--hidden", help=argparse.SUPPRESS)
    page = check_docs.cli_page(parser)
    assert "# The `nvila` command" in page
    assert "## nvila run" in page
    assert "| `[recipe]` | `quickstart` | name or path |" in page
    assert "| `[overrides ...]` |  | key=value |" in page
    assert "| `-f, --fast` |  | 100% quick |" in page
    assert "| `--format {a,b}` | `a` | a\\|b (default: a) |" in page
    assert "hidden" not in page


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "-q"]
    command += ["-p", "pytest_socket", "-p", "pytest_timeout", "--rootdir", str(folder), *arguments, str(folder)]
    # Without the plugins that these tests do not need, each run starts in half the time.
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def inner(tmp_path: Path) -> Path:
    """A tests folder with our conftest and one golden file."""
    folder = tmp_path / "tests"
    (folder / "golden").mkdir(parents=True)
    # Whatever conftest shares with other folders comes along, so that a new shared module needs no line here.
    for module in (ROOT / "tests").glob("*.py"):
        if not module.name.startswith("test_"):
            shutil.copy(module, folder)
    (folder / "golden/page.txt").write_text("old\nsame\n")
    return folder


def test_golden_shows_the_diff_and_update_accepts_it(inner: Path) -> None:
    (inner / "test_page.py").write_text(
        "def test_page(golden): golden('page.txt', 'new\\nsame\\n')\n"
        "def test_absent(golden): golden('deep/absent.txt', 'x')\n"
        "def test_other(): assert False\n"
    )
    failed = run_pytest(inner)
    assert "-old" in failed.stdout
    assert "+new" in failed.stdout
    assert "tests/golden/deep/absent.txt does not exist; write it with: make golden" in failed.stdout
    updated = run_pytest(inner, "--update-golden")
    assert "2 passed, 1 deselected" in updated.stdout
    assert (inner / "golden/page.txt").read_text() == "new\nsame\n"
    assert "2 passed" in run_pytest(inner, "-k", "page or absent").stdout


def test_marked_tests_skip_with_a_reason_and_sockets_stay_local(inner: Path) -> None:
    (inner / "test_marks.py").write_text(
        "import pytest, socket\n"
        "@pytest.mark.slow\ndef test_slow(): pass\n"
        "@pytest.mark.cluster\ndef test_cluster(): pass\n"
        "def test_remote():\n"
        "    with pytest.raises(Exception, match='192.0.2.1'):\n"
        "        socket.create_connection(('192.0.2.1', 80), timeout=0.2)\n"
        "def test_local():\n"
        "    server = socket.create_server(('127.0.0.1', 0))\n"
        "    socket.create_connection(server.getsockname()).close()\n"
        "    server.close()\n"
    )
    done = run_pytest(inner)
    assert "longer than ten seconds: run with --slow" in done.stdout
    assert "needs a Kubernetes cluster: run with --cluster" in done.stdout
    assert "2 passed, 2 skipped" in done.stdout
    assert "3 passed, 1 skipped" in run_pytest(inner, "--slow").stdout


@pytest.mark.parametrize("module", ["nvila", "nvila.data.media", "nvila_platform.store", "nvila_pipelines.cli"])
def test_our_own_warnings_are_errors(module: str) -> None:
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module=module)


def test_warnings_of_others_are_not() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module="nvilasomething.core")
    assert len(seen) == 1
