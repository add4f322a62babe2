"""What `nvila doctor` looks at. Nothing is imported, started or written: packages are read from their metadata."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from nvila_pipelines.cli.failures import extras
from nvila_platform.settings import Settings

Status = Literal["ok", "warn", "missing"]
OK: Status = "ok"
WARN: Status = "warn"
MISSING: Status = "missing"

# What `nvila run` takes; the packages of the other extras only matter to those who ask for them.
NEEDED_EXTRAS = ("", "model", "train", "serve", "pipelines", "quickstart")
OLDEST_PYTHON = (3, 11)
PORTS = {8080: "nvila serve --port 0", 5000: "nvila ui --port 0"}
TOOLS = {
    "helm": "renders the charts; fetch it: make charts",
    "kubectl": "talks to a cluster; fetch it: make charts",
    "docker": "builds the images; install Docker Engine: https://docs.docker.com/engine/install",
}
_GIB = 2**30
# Least for a run, and what makes it comfortable.
_DISK_GIB = (1.0, 5.0)
_MEMORY_GIB = (2.0, 4.0)
_CHECKOUT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding.

    Args:
        name: What was looked at.
        status: `missing` means that `nvila run` cannot work.
        detail: What was found.
        fix: Command or change that makes it `ok`.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the plain values."""
        return asdict(self)


def check_machine(settings: Settings) -> list[Check]:
    """Look at everything that a run, and the work around it, stands on."""
    return [
        check_python(),
        check_cores(),
        check_memory(memory_gib()),
        check_workspace(settings.workspace),
        check_disk(settings.workspace),
        *check_packages(extras(), tested_versions(_CHECKOUT / "constraints.txt")),
        *(check_port(port, instead) for port, instead in PORTS.items()),
        check_cuda(),
        *(check_tool(name, use) for name, use in TOOLS.items()),
    ]


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    """Check the interpreter."""
    detail = f"{'.'.join(map(str, version))} on {platform.system()} {platform.machine()}"
    if version[:2] < OLDEST_PYTHON:
        return Check(name="python", status=MISSING, detail=detail, fix="make PYTHON=/path/to/python3.11 setup")
    if not sys.platform.startswith("linux"):
        return Check(name="python", status=WARN, detail=f"{detail}; tested on Linux", fix="use Linux")
    return Check(name="python", status=OK, detail=detail)


def check_cores() -> Check:
    """Check how many processors this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 2:
        return Check(name="cores", status=WARN, detail="1; a run takes twice its time", fix="allow two cores")
    return Check(name="cores", status=OK, detail=str(cores))


def memory_gib(meminfo: Path = Path("/proc/meminfo")) -> float | None:
    """Return the memory that programs can still get, or None where the system does not say."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kib is None else int(kib) * 1024 / _GIB


def check_memory(gib: float | None) -> Check:
    """Check the memory."""
    if gib is None:
        return Check(name="memory", status=WARN, detail="unknown", fix="make sure that 4 GiB are free")
    return _amount("memory", gib, "available", _MEMORY_GIB, "close other programs")


def check_workspace(workspace: Path) -> Check:
    """Check that the workspace is or can become a folder that we may write."""
    name, fix = "workspace", "name another folder: nvila run --workspace DIR"
    if workspace.exists() and not workspace.is_dir():
        return Check(name=name, status=MISSING, detail=f"{workspace} is a file", fix=fix)
    parent = _existing(workspace)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        return Check(name=name, status=MISSING, detail=f"{parent} cannot be written", fix=fix)
    return Check(name=name, status=OK, detail=f"{workspace}{'' if workspace.exists() else ' (will be made)'}")


def check_disk(workspace: Path) -> Check:
    """Check the space where the workspace is."""
    free = shutil.disk_usage(_existing(workspace)).free / _GIB
    return _amount("disk", free, "free", _DISK_GIB, f"free some space near {workspace}")


def tested_versions(constraints: Path) -> dict[str, str]:
    """Return the tested versions, or nothing where the package was installed without its checkout."""
    try:
        lines = constraints.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition("#")[0].partition("==") for line in lines)
    return {name.strip().lower().replace("_", "-"): version.strip() for name, mark, version in pairs if mark}


def check_packages(wanted: dict[str, dict[str, str]], tested: dict[str, str]) -> Iterator[Check]:
    """Check the installed packages of every extra against the lowest and the tested versions."""
    if not wanted:
        yield Check(name="packages", status=MISSING, detail="nvila is not installed", fix="make setup")
    for extra, packages in wanted.items():
        name = f"packages [{extra}]" if extra else "packages"
        found = {package: _installed(package) for package in packages}
        absent = [package for package, version in found.items() if version is None]
        old = [
            f"{package} {version} (needs {packages[package]})"
            for package, version in found.items()
            if version is not None and _numbers(version) < _numbers(packages[package])
        ]
        other = [
            f"{package} {version} (tested: {tested[package]})"
            for package, version in found.items()
            if version is not None and package in tested and _numbers(version) != _numbers(tested[package])
        ]
        fix = "make setup" if tested else f"pip install 'nvila[{extra}]'" if extra else "pip install nvila"
        if absent or old:
            problems = [f"{package} is not installed" for package in absent] + old
            status = MISSING if extra in NEEDED_EXTRAS else WARN
            yield Check(name=name, status=status, detail=", ".join(problems), fix=fix)
        elif other:
            yield Check(name=name, status=WARN, detail=", ".join(other), fix=fix)
        else:
            yield Check(name=name, status=OK, detail=", ".join(f"{key} {value}" for key, value in found.items()))


def check_port(port: int, instead: str) -> Check:
    """Check that a port that we listen on by default is free."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as e:
            return Check(name=f"port {port}", status=WARN, detail=e.strerror or str(e), fix=instead)
    return Check(name=f"port {port}", status=OK, detail="free")


def check_cuda() -> Check:
    """Check for an NVIDIA device; a run does without one."""
    program = shutil.which("nvidia-smi")
    if program is not None:
        command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0 and done.stdout.strip():
            return Check(name="cuda device", status=OK, detail="; ".join(done.stdout.strip().splitlines()))
    return Check(
        name="cuda device",
        status=WARN,
        detail="none; `nvila run` works on the CPU",
        fix="for a GPU, install NVIDIA's driver and a CUDA build of torch",
    )


def check_tool(name: str, use: str) -> Check:
    """Check for a program that the work around a cluster needs; a run does without it."""
    own = _CHECKOUT / ".tools" / "bin" / name
    path = shutil.which(name) or (str(own) if own.is_file() else None)
    if path is None:
        return Check(name=name, status=WARN, detail="not found; not needed by `nvila run`", fix=use)
    return Check(name=name, status=OK, detail=path)


def _amount(name: str, gib: float, word: str, limits: tuple[float, float], fix: str) -> Check:
    least, comfortable = limits
    detail = f"{gib:.1f} GiB {word}"
    if gib >= comfortable:
        return Check(name=name, status=OK, detail=detail)
    status = MISSING if gib < least else WARN
    return Check(name=name, status=status, detail=f"{detail}, {comfortable:g} GiB are comfortable", fix=fix)


def _existing(path: Path) -> Path:
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Return a version's numbers: enough to compare releases; what follows `+` is a build, not a version."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
