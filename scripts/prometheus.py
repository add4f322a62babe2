"""Fetch the real `prometheus` and `promtool` that check the alert rules and dashboards, into `.tools/bin`.

They come from Debian's package, which runs on any Linux of this processor: no registry of Python or Node has them. The
package is pinned by version and digest. Without it the tests that need it skip and say so.

Usage:
    python scripts/prometheus.py [--dest .tools/bin]
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tools import RETRYABLE, ToolError, replace, require_platform, run, sha256

NAME = "prometheus_2.42.0+ds-5+deb12u1_amd64.deb"
URL = f"http://deb.debian.org/debian/pool/main/p/prometheus/{NAME}"
DEB_SHA256 = "81d59a24fce84f7fbe97a45a4f2914b6a5881b5cd1db2a6a0e129e515e1a5f55"
BINARIES = ("prometheus", "promtool")
RECORD = "prometheus.json"
_TIMEOUT_S = 60
_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    what = "Fetch prometheus and promtool for checks of rules and dashboards."
    return run("prometheus and promtool", what, is_complete, fetch, argv)


def is_complete(dest: Path) -> bool:
    """Whether `dest` holds the binaries of the pinned package, byte for byte as they were recorded."""
    try:
        record = json.loads((dest / RECORD).read_text(encoding="utf-8"))
        digests: dict[str, str] = record["binaries"]
        same = all(sha256((dest / name).read_bytes()) == digests[name] for name in BINARIES)
        return same and bool(record["deb_sha256"] == DEB_SHA256)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fetch(dest: Path) -> None:
    """Download the package and put its binaries into `dest`, each one whole or not at all.

    Raises:
        ToolError: The platform has no such binaries, or the package cannot be had.
    """
    require_platform()
    binaries = unpack(download(URL))
    dest.mkdir(parents=True, exist_ok=True)
    for name, content in binaries.items():
        replace(dest / name, content, mode=0o755)
    record = {"package": NAME, "deb_sha256": DEB_SHA256, "binaries": {k: sha256(v) for k, v in binaries.items()}}
    replace(dest / RECORD, (json.dumps(record, indent=2) + "\n").encode(), mode=0o644)


def download(url: str) -> bytes:
    """Return the package, its digest verified."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - a fixed address; the digest decides
            content: bytes = answer.read()
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        way_out = "check the network, or put prometheus and promtool on PATH"
        raise ToolError(f"cannot download {NAME}: {reason}; {way_out}", RETRYABLE) from error
    if sha256(content) != DEB_SHA256:
        raise ToolError(f"{NAME} is not the file that was pinned: its digest differs")
    return content


def unpack(package: bytes) -> dict[str, bytes]:
    """Return name -> bytes of the binaries: a tar inside an `ar` archive."""
    try:
        data = next(content for name, content in _members(package) if name.startswith("data.tar"))
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            found = {}
            for name in BINARIES:
                file = archive.extractfile(f"./usr/bin/{name}")
                if file is None:
                    raise KeyError(name)
                found[name] = file.read()
            return found
    except (StopIteration, KeyError, ValueError, tarfile.TarError) as error:
        raise ToolError(f"{NAME} does not hold {' and '.join(BINARIES)} where they are expected: {error}") from error


def _members(package: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of the members of an `ar` archive."""
    if not package.startswith(_AR_MAGIC):
        raise ValueError("no ar archive")
    at = len(_AR_MAGIC)
    while at + _AR_HEADER <= len(package):
        header = package[at : at + _AR_HEADER]
        size = int(header[48:58])
        at += _AR_HEADER
        yield header[:16].decode("ascii").strip(), package[at : at + size]
        at += size + size % 2


if __name__ == "__main__":
    sys.exit(main())
