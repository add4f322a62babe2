"""The boundary of the process: every way to fail becomes a line, a fix and an exit code."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from nvila.errors import CapabilityError, InfrastructureError, NvilaError, ResourceError
from nvila_pipelines.cli.output import emit_json
from nvila_platform.artifacts import storage_errors
from nvila_platform.launch.stopping import GO_ON, Terminated
from nvila_platform.settings import Settings

INTERRUPTED = 130
# As a shell reports a program that its reader's end of the pipe ended.
BROKEN_PIPE = 141
_OURS = ("nvila", "nvila_platform", "nvila_pipelines")
# Where the name of a module is not the name of its package.
_PACKAGES = {"PIL": "pillow", "yaml": "pyyaml"}


def guarded(work: Callable[[], int], args: argparse.Namespace) -> int:
    """Run `work` and return its exit code, or the one of what it raised.

    Args:
        work: Returns an exit code.
        args: `debug` shows tracebacks, `json` reports errors on standard output too, `workspace` gets the log of
            unexpected errors. Read after `work` has ended, which may have filled them.
    """
    try:
        code = work()
        sys.stdout.flush()
        return code
    except Terminated as e:
        return _failed(InfrastructureError(str(e), GO_ON), args)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted: the same command goes on where this one stopped\n")
        return INTERRUPTED
    except BrokenPipeError:
        # Python would complain once more when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as e:
        error = as_typed(e, args.workspace)
        if args.debug:
            traceback.print_exc()
        if error is None:
            error = _unexpected(e, args.workspace)
        return _failed(error, args)


def _failed(error: NvilaError, args: argparse.Namespace) -> int:
    report(error)
    if args.json:
        emit_json({"error": error.to_dict(), "exit_code": error.exit_code})
    return error.exit_code


def report(error: NvilaError) -> None:
    """Write an error to standard error."""
    sys.stderr.write(f"error: {error.message}\n")
    if error.hint:
        first, *rest = error.hint.splitlines()
        sys.stderr.write("".join([f"  fix: {first}\n", *(f"       {line}\n" for line in rest)]))


def as_typed(error: Exception, workspace: Path | None) -> NvilaError | None:
    """Return the typed error that an exception amounts to, or None for one that nobody foresaw."""
    if isinstance(error, NvilaError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return _missing_package(error)
    if isinstance(error, MemoryError):
        return ResourceError("the machine ran out of memory", "close other programs, or use smaller batches")
    if isinstance(error, OSError):
        home = _workspace(workspace)
        try:
            with storage_errors(home):
                raise error
        except ResourceError as full:
            return full
        except NvilaError as refused:
            # A path elsewhere is no matter of the workspace, whatever went wrong with it.
            return refused if _inside(error.filename, home) else None
        except OSError:
            return None
    return None


def _missing_package(error: ModuleNotFoundError) -> NvilaError | None:
    module = (error.name or "").partition(".")[0]
    if not module or module in _OURS:
        return None
    package = _PACKAGES.get(module, module).replace("_", "-").lower()
    extra = next((name for name, packages in extras().items() if package in packages), None)
    wanted = f"'nvila[{extra}]'" if extra else package
    return CapabilityError(f"the Python package {package} is not installed", f"pip install {wanted}")


def extras() -> dict[str, dict[str, str]]:
    """Return the packages of every extra of this distribution, each with its lowest version ("" for any).

    Packages of the core stand under the empty name. Metadata repeats the packages of extras that an extra includes;
    here each stands once, in the smallest extra that has it.
    """
    try:
        requirements = importlib.metadata.requires("nvila") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found: dict[str, dict[str, str]] = {"": {}}
    for requirement in requirements:
        text, _, marker = requirement.partition(";")
        extra = re.search(r"extra == ['\"]([^'\"]+)", marker)
        name = re.match(r"[A-Za-z0-9._-]+", text)
        lowest = re.search(r">=\s*([0-9][^,\s]*)", text)
        if name is not None and name[0].lower() != "nvila":
            packages = found.setdefault(extra[1] if extra else "", {})
            packages[name[0].lower().replace("_", "-")] = lowest[1] if lowest else ""
    once: dict[str, dict[str, str]] = {}
    seen: set[str] = set()
    for extra_name, packages in sorted(found.items(), key=lambda item: (item[0] != "", len(item[1]))):
        once[extra_name] = {package: version for package, version in packages.items() if package not in seen}
        seen |= packages.keys()
    return once


def _unexpected(error: Exception, workspace: Path | None) -> NvilaError:
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    name = f"error-{stamp}-{os.getpid()}.log"
    text = f"command: {sys.argv}\n\n{''.join(traceback.format_exception(error))}"
    lines = str(error).strip().splitlines() or [""]
    what = f"{type(error).__name__}: {lines[0]}"[:300]
    for folder in (_workspace(workspace), Path(tempfile.gettempdir())):
        # The workspace is not made for this: a command that fails before it has one leaves nothing behind.
        if not folder.is_dir():
            continue
        logs = folder / "logs" if folder != Path(tempfile.gettempdir()) else folder
        try:
            logs.mkdir(exist_ok=True)
            (logs / name).write_text(text, encoding="utf-8")
        except OSError:
            continue
        return NvilaError(f"unexpected {what}", f"this is a bug; its traceback is in {logs / name}")
    return NvilaError(f"unexpected {what}", "this is a bug; run it again with --debug for its traceback")


def _workspace(given: Path | None) -> Path:
    try:
        return Settings.load(given).workspace
    except NvilaError:
        return Path("nvila-workspace").absolute()


def _inside(filename: object, home: Path) -> bool:
    return isinstance(filename, str) and Path(filename).absolute().is_relative_to(home)
