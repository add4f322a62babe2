"""scripts/prometheus.py: the binaries arrive whole, once, or not at all with the reason."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CONTENT = {"prometheus": b"#!/bin/sh\necho prometheus\n", "promtool": b"#!/bin/sh\necho promtool."}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.reload(importlib.import_module("prometheus"))
    monkeypatch.setattr(module, "require_platform", lambda: None)
    return module


def package(inside: dict[str, bytes], data: str = "data.tar.xz") -> bytes:
    """Return a package of Debian's shape; the odd length of the first member is padded, as ar does."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for name, content in inside.items():
            entry = tarfile.TarInfo(f"./usr/bin/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    parts = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0"), (data, packed.getvalue())):
        parts += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        parts += b"\n" * (len(content) % 2)
    return parts


@pytest.fixture
def pool(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server with a small package whose digest is the pinned one."""
    folder = tmp_path / "pool"
    folder.mkdir()
    (folder / "it.deb").write_bytes(package(CONTENT))
    monkeypatch.setattr(tool, "DEB_SHA256", hashlib.sha256((folder / "it.deb").read_bytes()).hexdigest())

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    monkeypatch.setattr(tool, "URL", f"http://127.0.0.1:{server.server_address[1]}/it.deb")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder
    server.shutdown()
    server.server_close()
    thread.join()


def test_binaries_are_installed_once_and_a_damaged_one_again(
    tool: ModuleType, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / "bin"
    assert tool.main(["--dest", str(dest)]) == 0
    assert {path.name for path in dest.iterdir()} == {*CONTENT, tool.RECORD}
    assert all((dest / name).read_bytes() == content for name, content in CONTENT.items())
    assert all(os.access(dest / name, os.X_OK) for name in CONTENT)
    (dest / "promtool").write_bytes(b"#!")
    assert tool.main(["--dest", str(dest)]) == 0
    assert (dest / "promtool").read_bytes() == CONTENT["promtool"]
    (pool / "it.deb").unlink()
    capsys.readouterr()
    assert tool.main(["--dest", str(dest)]) == 0
    assert capsys.readouterr().out.startswith("prometheus and promtool are in")


@pytest.mark.parametrize("damage", ["no-record", "another-package", "broken-record"])
def test_a_record_that_says_something_else_is_not_believed(
    tool: ModuleType, pool: Path, tmp_path: Path, damage: str
) -> None:
    dest = tmp_path / "bin"
    tool.fetch(dest)
    assert tool.is_complete(dest)
    record = dest / tool.RECORD
    match damage:
        case "no-record":
            record.unlink()
        case "another-package":
            record.write_text(json.dumps(json.loads(record.read_text()) | {"deb_sha256": "0" * 64}))
        case "broken-record":
            record.write_text("{")
    assert not tool.is_complete(dest)


def test_another_file_than_the_pinned_one_is_refused(
    tool: ModuleType, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pool / "it.deb").write_bytes(package({**CONTENT, "promtool": b"else"}))
    assert tool.main(["--dest", str(tmp_path / "bin")]) == 1
    assert "is not the file that was pinned" in capsys.readouterr().err
    assert not (tmp_path / "bin").exists()


@pytest.mark.parametrize(
    "content",
    [package({"prometheus": b"x"}), package(CONTENT, "other.tar.xz"), b"no archive", package(CONTENT)[:200]],
    ids=["no-promtool", "no-data", "no-ar", "cut"],
)
def test_a_package_of_another_shape_is_named(tool: ModuleType, content: bytes) -> None:
    with pytest.raises(tool.ToolError, match="does not hold prometheus and promtool where they are expected"):
        tool.unpack(content)


def test_without_network_there_is_one_line_and_no_leftover(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Nothing listens on the discard port of this machine.
    monkeypatch.setattr(tool, "URL", "http://127.0.0.1:9/it.deb")
    assert tool.main(["--dest", str(tmp_path / "bin")]) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot download {tool.NAME}: ")
    assert line.endswith("or put prometheus and promtool on PATH")
    assert not (tmp_path / "bin").exists()


def test_a_folder_that_cannot_be_written_is_one_line(
    tool: ModuleType, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert tool.main(["--dest", str(tmp_path / "file" / "bin")]) == 1
    assert capsys.readouterr().err.startswith("error: cannot write to")
