"""Make `.venv` ready for this checkout: create it, install under constraints.txt, repair it when it is half-made.

`make` runs this before every target that needs Python packages, so a finished environment costs one digest. Only the
standard library is imported: nothing else exists yet when this runs.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

EXTRAS = "quickstart,dev"
INPUTS = ("pyproject.toml", "constraints.txt")
STAMP = ".installed"
UNFINISHED = ".installing"
OLDEST = (3, 11)


class SetupError(Exception):
    """The environment could not be made; the message is for the terminal."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the process exit code."""
    parser = argparse.ArgumentParser(description="Create or repair .venv for this checkout.")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    args = parser.parse_args(argv)
    try:
        ensure(args.root.resolve())
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run the same command again, it starts over cleanly", file=sys.stderr)
        return 130
    return 0


def ensure(
    root: Path,
    create: Callable[[Path], None] | None = None,
    install: Callable[[Path, Path], None] | None = None,
) -> str:
    """Bring `<root>/.venv` up to date.

    Args:
        root: The checkout.
        create: Makes an environment in an empty folder; the default runs `python -m venv`.
        install: Installs the project at `root` into the environment; the default runs pip.

    Returns:
        What was done: "ready", "installed" or "rebuilt".

    Raises:
        SetupError: When creating or installing fails.
    """
    venv = root / ".venv"
    with _only_one(root):
        wanted = fingerprint(root)
        stamp, unfinished = venv / STAMP, venv / UNFINISHED
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted and _works(venv):
            return "ready"
        outcome = "installed"
        reason = _why_rebuild(root, venv)
        if reason:
            _say(f"{reason}; making .venv")
            _empty(venv)
            outcome = "rebuilt"
        stamp.unlink(missing_ok=True)
        # pip takes a half-unpacked package for an installed one, so an install that did not end is never continued.
        unfinished.touch()
        if reason:
            (create or _create)(venv)
        (install or _install)(root, venv)
        unfinished.unlink()
        stamp.write_text(wanted, encoding="utf-8")
        return outcome


def fingerprint(root: Path) -> str:
    """What an installed environment depends on: the folder and the digest of the files that say what to install.

    The folder, because scripts and the editable install hold absolute paths: a moved checkout needs a new environment.
    """
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update(b"\0" + (root / name).read_bytes())
    return f"{root}\n{digest.hexdigest()}\n"


def _why_rebuild(root: Path, venv: Path) -> str:
    if not venv.exists():
        return "no .venv yet"
    if (venv / UNFINISHED).exists():
        return "the last install was interrupted"
    if not _works(venv):
        return "the .venv here is incomplete or its Python is gone"
    stamp = venv / STAMP
    made_for = stamp.read_text(encoding="utf-8").partition("\n")[0] if stamp.is_file() else str(root)
    if made_for != str(root):
        return f"the .venv here was made for {made_for}"
    return ""


def _works(venv: Path) -> bool:
    probe = f"import sys, pip; sys.exit(sys.version_info < {OLDEST})"
    try:
        return subprocess.run([str(venv / "bin" / "python"), "-c", probe], capture_output=True).returncode == 0
    except OSError:
        return False


@contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Two terminals may run make at once; the second waits and then finds everything ready."""
    with (root / INPUTS[0]).open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            _say("another make is installing; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _empty(venv: Path) -> None:
    if venv.is_symlink() or venv.is_file():
        venv.unlink()
    elif venv.exists():
        shutil.rmtree(venv)
    venv.mkdir()


def _create(venv: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
    if done.returncode:
        detail = (done.stdout + done.stderr).strip().splitlines()
        raise SetupError(
            f"{sys.executable} -m venv failed: {detail[0] if detail else 'no output'}\n"
            "  fix: give a Python that has venv and pip, for example: make PYTHON=/usr/local/bin/python3.12"
            " (on Debian and Ubuntu: apt install python3-venv)"
        )


def _install(root: Path, venv: Path) -> None:
    began = time.monotonic()
    log = venv / "install.log"
    _say("installing into .venv; the first time takes some minutes and 2-3 GB")
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    # pip compiles to bytecode: a minute now, or 20 s at every start of every step where Python may not write it later.
    command += ["-c", str(root / "constraints.txt"), "-e", f"{root}[{EXTRAS}]"]
    with (
        log.open("w", encoding="utf-8") as out,
        subprocess.Popen(
            command, cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            out.write(line)
            _show(line)
    _show("")
    if child.returncode:
        tail = "\n".join(f"  {line}" for line in log.read_text(encoding="utf-8").splitlines()[-8:])
        raise SetupError(f"pip install failed:\n{tail}\n  whole output: {log}; fix the cause and run the same command")
    _say(f"installed in {time.monotonic() - began:.0f} s")


def _show(line: str) -> None:
    """On a terminal, keep one line saying where pip is; elsewhere stay quiet, the log has it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line.strip()[:100]}", end="", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    print(f"setup: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
