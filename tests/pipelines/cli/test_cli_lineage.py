"""`nvila lineage`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nvila_pipelines.cli.app import main
from nvila_platform.artifacts import content_key, utc_now, write_manifest
from nvila_platform.registry import register_model, set_alias
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, LocalStore

if TYPE_CHECKING:
    from collections.abc import Mapping


def make(store: LocalStore, step: str, inputs: Mapping[str, str]) -> ArtifactRef:
    key = content_key(step, {}, inputs, "1+code")
    directory = store.work_dir(step, key)
    (directory / "out.txt").write_text(step)
    write_manifest(directory, step=step, key=key, config={}, inputs=inputs, code_version="1+code", started_at=utc_now())
    return store.publish(directory)


@pytest.fixture
def made(tracked: Settings) -> tuple[Settings, dict[str, ArtifactRef]]:
    store = LocalStore(Path(tracked.store_uri))
    data = make(store, "data", {"download": "f" * 64})
    wide = make(store, "train", {"data": data.digest})
    small = make(store, "quantize", {"model": wide.digest})
    gate = make(store, "gate", {"quantized": small.digest})
    version = register_model(tracked, "nvila", small, None, {"nvila.gate": gate.digest})
    set_alias(tracked, "nvila", "champion", version.version)
    return tracked, {"data": data, "train": wide, "quantize": small, "gate": gate}


def test_a_version_leads_to_its_verdict_its_weights_and_its_data(
    made: tuple[Settings, dict[str, ArtifactRef]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, refs = made
    page = tmp_path / "page.html"
    command = ["lineage", "models:/nvila@champion", "--workspace", str(settings.workspace)]
    assert main([*command, "--html", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    short = {step: ref.digest[:12] for step, ref in refs.items()}
    assert lines[:6] == [
        "registered models:/nvila/1",
        f"  model: quantize {short['quantize']} 1+code",
        f"    model: train {short['train']} 1+code",
        f"      data: data {short['data']} 1+code",
        "        download: external ffffffffffff",
        f"  verdict: gate {short['gate']} 1+code",
    ]
    text = page.read_text()
    assert "<svg" in text
    assert all(digest in text for digest in short.values())
    assert main([*command, "--verify", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["lineage"]["inputs"]["verdict"]["digest"] == refs["gate"].digest
    assert said["verified"] == {ref.digest: "sound" for ref in refs.values()} | {"f" * 64: "outside"}


@pytest.mark.parametrize("form", ["digest", "folder"])
def test_an_artifact_is_found_by_digest_and_by_folder(
    made: tuple[Settings, dict[str, ArtifactRef]], form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, refs = made
    wide = refs["train"]
    ref = wide.digest if form == "digest" else str(LocalStore(Path(settings.store_uri)).fetch(wide))
    assert main(["lineage", ref, "--workspace", str(settings.workspace)]) == 0
    assert capsys.readouterr().out.startswith(f"train {wide.digest[:12]}")


def test_a_damaged_ancestor_is_found(
    made: tuple[Settings, dict[str, ArtifactRef]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings, refs = made
    directory = LocalStore(Path(settings.store_uri)).fetch(refs["data"])
    (directory / "out.txt").write_text("dato")
    command = ["lineage", "models:/nvila@champion", "--workspace", str(settings.workspace), "--verify"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "1 of 5 artifacts are damaged" in error
    assert "out.txt" in error


@pytest.mark.parametrize(("ref", "code"), [("nowhere", 2), ("0" * 64, 1)], ids=["folder", "digest"])
def test_a_reference_to_nothing(ref: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lineage", ref, "--workspace", str(tmp_path)]) == code
    assert "fix:" in capsys.readouterr().err
