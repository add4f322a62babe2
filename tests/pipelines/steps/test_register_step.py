"""The register step: refuses without the gate's word and says loudly when the registry is out."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvila.errors import GateError, InfrastructureError
from nvila_platform.artifacts import content_key, utc_now, write_manifest
from nvila_platform.store import ArtifactRef, LocalStore


def verdict(root: Path, agreed: bool) -> Path:
    root.mkdir(parents=True)
    (root / "verdict.json").write_text(json.dumps({"passed": agreed}), encoding="utf-8")
    return root


def stored(root: Path, step: str) -> ArtifactRef:
    store = LocalStore(root)
    key = content_key(step, {}, {}, "1")
    directory = store.work_dir(step, key)
    (directory / "file.txt").write_text(step, encoding="utf-8")
    write_manifest(directory, step=step, key=key, config={}, inputs={}, code_version="1", started_at=utc_now())
    return store.publish(directory)


def test_a_refused_model_is_not_registered(bench: Any) -> None:
    inputs = {"model": bench.root, "verdict": verdict(bench.root / "verdict", False)}
    with pytest.raises(GateError, match="the gate refused this model"):
        bench.run("register", inputs)
    assert not (bench.settings.workspace / "mlflow.db").exists()


def test_an_unreachable_registry_is_said_loudly_and_leaves_nothing(bench: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = Path(bench.settings.store_uri)
    refs = {"model": stored(store, "quantize"), "verdict": stored(store, "gate")}
    inputs = {"model": bench.root, "verdict": verdict(bench.root / "verdict", True)}
    settings = replace(bench.settings, tracking_uri=f"http://127.0.0.1:{port}")
    with pytest.raises(InfrastructureError, match="registering 'micro' failed") as failed:
        bench.run("register", inputs, refs=refs, settings=settings)
    assert failed.value.exit_code == 75
    assert failed.value.hint
    assert not (bench.root / "register" / "registered.json").exists()
