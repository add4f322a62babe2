"""What `nvila doctor` finds."""

from __future__ import annotations

import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila_pipelines.cli import machine
from nvila_pipelines.cli.machine import MISSING, OK, WARN


@pytest.fixture
def quiet_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the only place for programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_this_machine_is_ready_and_stays_untouched(nvila: Callable[..., Any], tmp_path: Path) -> None:
    done = nvila("doctor", "--workspace", str(tmp_path / "ws"))
    assert done.code == 0
    assert done.out.splitlines()[-1] == "ready: nvila run"
    assert not (tmp_path / "ws").exists()
    for name in (
        "python",
        "cores",
        "memory",
        "disk",
        "workspace",
        "packages [train]",
        "port 8080",
        "cuda device",
        "helm",
    ):
        assert f"  {name} " in done.out


def test_json_lists_every_check(nvila: Callable[..., Any]) -> None:
    found = nvila("doctor", "--json").last_json
    assert found["ok"] is True
    assert {"name", "status", "detail", "fix"} == set(found["checks"][0])
    assert {check["status"] for check in found["checks"]} <= {"ok", "warn", "missing"}
    assert all(check["fix"] for check in found["checks"] if check["status"] != "ok")


def test_missing_workspace_is_an_exit_code(nvila: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = nvila("doctor", "--workspace", str(tmp_path / "file"))
    assert done.code == 1
    assert done.out.splitlines()[-1] == "missing for `nvila run`: workspace"
    assert nvila("doctor", "--json", "--workspace", str(tmp_path / "file")).last_json["ok"] is False


def test_workspace_below_a_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert machine.check_workspace(tmp_path / "file" / "ws").status == MISSING
    assert machine.check_workspace(tmp_path / "a" / "b").status == OK


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10, 4), MISSING), ((3, 11, 0), OK), ((3, 13, 1), OK)], ids=lambda value: str(value)
)
def test_python_version(version: tuple[int, ...], status: str) -> None:
    assert machine.check_python(version).status == status


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux files")
def test_memory_is_what_programs_can_get(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable:    3145728 kB\n")
    assert machine.memory_gib(meminfo) == 3.0
    assert machine.memory_gib(tmp_path / "absent") is None
    assert [machine.check_memory(gib).status for gib in (None, 1.0, 3.0, 8.0)] == [WARN, MISSING, WARN, OK]


def test_packages_are_compared_with_lowest_and_tested_versions() -> None:
    import pydantic

    version = pydantic.VERSION
    rows = {
        "": {"pydantic": "1.0"},
        "model": {"pydantic": "99"},
        "serve": {"no-such-package": ""},
        "train": {"pydantic": ""},
        "dev": {"no-such-package": ""},
    }
    found = {check.name: check for check in machine.check_packages(rows, {})}
    assert found["packages"].detail == f"pydantic {version}"
    assert {name: check.status for name, check in found.items()} == {
        "packages": OK,
        "packages [model]": MISSING,
        "packages [serve]": MISSING,
        "packages [train]": OK,
        "packages [dev]": WARN,
    }
    assert found["packages [model]"].detail == f"pydantic {version} (needs 99)"
    assert found["packages [serve]"].fix == "pip install 'nvila[serve]'"
    (other,) = machine.check_packages({"": {"pydantic": ""}}, {"pydantic": "1.0"})
    assert (other.status, other.detail) == (WARN, f"pydantic {version} (tested: 1.0)")
    assert other.fix == "make setup"
    assert next(iter(machine.check_packages({}, {}))).status == MISSING


def test_tested_versions_come_from_the_constraints(tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("# comment\nTorch==2.13.0\neasy_vqa==1.0  # why\n\n")
    assert machine.tested_versions(path) == {"torch": "2.13.0", "easy-vqa": "1.0"}
    assert machine.tested_versions(tmp_path / "absent") == {}


def test_build_of_a_version_is_no_difference() -> None:
    assert machine._numbers("2.13.0+cpu") == machine._numbers("2.13")
    assert machine._numbers("2.9.1") < machine._numbers("2.13.0")


def test_port_in_use_names_the_way_around() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        check = machine.check_port(holder.getsockname()[1], "nvila serve --port 0")
    assert (check.status, check.fix) == (WARN, "nvila serve --port 0")
    assert check.detail


def test_cuda_device_is_asked_of_the_driver(quiet_path: Path) -> None:
    assert machine.check_cuda().status == WARN
    program = quiet_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    check = machine.check_cuda()
    assert (check.status, check.detail) == (OK, "NVIDIA H200, 143771 MiB")
    program.write_text("#!/bin/sh\nexit 9\n")
    assert machine.check_cuda().status == WARN


def test_tools_of_a_cluster_are_optional(quiet_path: Path) -> None:
    check = machine.check_tool("no-such-tool", "get it: make charts")
    assert (check.status, check.fix) == (WARN, "get it: make charts")
    program = quiet_path / "no-such-tool"
    program.touch(mode=0o755)
    assert machine.check_tool("no-such-tool", "").detail == str(program)
