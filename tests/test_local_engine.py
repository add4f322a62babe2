"""scripts/local_engine.py without Buildah: how a storage keeps its layers."""

from __future__ import annotations

from pathlib import Path

import local_engine
import pytest

PLACES = ("--root", "store")
# What takes `from scratch` and fails at the verb that it is made with.
STUB = """#!/bin/sh
echo "$*" >> "{log}"
case "$*" in *" {fails}"*) echo "no such file system" >&2; exit 125;; esac
case "$*" in *" from scratch") echo working-container;; esac
"""


@pytest.mark.parametrize(
    ("fails", "found", "verbs"),
    [
        ("nothing", "overlay", ["from scratch", "mount working-container", "rm working-container"]),
        # The kernel has no overlays, or not on this file system.
        ("mount", "vfs", ["from scratch", "mount working-container", "rm working-container"]),
        ("from", "vfs", ["from scratch"]),
    ],
)
def test_layers_are_overlaid_where_the_kernel_does_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, found: str, verbs: list[str]
) -> None:
    program = tmp_path / "buildah"
    program.write_text(STUB.format(log=tmp_path / "log", fails=fails))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert local_engine.driver(PLACES) == found
    asked = (tmp_path / "log").read_text().splitlines()
    assert asked == [f"--root store --storage-driver overlay {verb}" for verb in verbs]
