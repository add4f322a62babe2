"""`nvila curate --large models:/name@alias`: scorers out of a real MLflow registry."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nvila_platform.artifacts import content_key, utc_now, write_manifest
from nvila_platform.registration import register_model
from nvila_platform.registry import set_alias
from nvila_platform.settings import Settings
from nvila_platform.store import LocalStore

Curate = Callable[..., int]


def register(settings: Settings, name: str, model: Path) -> int:
    """Publish a model folder as a step does, and register it."""
    store = LocalStore(Path(settings.store_uri))
    key = content_key("train", {"name": name, "from": str(model)}, {}, "1")
    folder = store.work_dir("train", key)
    shutil.copytree(model, folder / "model")
    write_manifest(folder, step="train", key=key, config={}, inputs={}, code_version="1", started_at=utc_now())
    return register_model(settings, name, store.publish(folder), run_id=None, tags={}).version


@pytest.mark.slow
def test_registered_models_score_as_their_folders_do(
    curate: Curate, models: dict[str, Path], llava: Any, tracked: Settings, capsys: Any, tmp_path: Path
) -> None:
    small = register(tracked, "tiny", models["small"])
    # The alias moved: the large model is the second version.
    register(tracked, "team", models["small"])
    set_alias(tracked, "team", "champion", register(tracked, "team", models["large"]))
    data = llava(9)
    words = [data, "--threads", "1", "--workspace", tracked.workspace]
    assert curate(*words, "--small", models["small"], "--large", models["large"], "--out", "folders") == 0
    named = ["--small", f"models:/tiny/{small}", "--large", "models:/team@champion"]
    assert curate(*words, *named, "--out", "named") == 0
    tables = [pq.read_table(tmp_path / out / "scores.parquet") for out in ("folders", "named")]
    assert tables[0].equals(tables[1])
    specs = [json.loads((tmp_path / out / "scoring.json").read_text()) for out in ("folders", "named")]
    assert specs[0]["large_digest"] == specs[1]["large_digest"] != specs[1]["small_digest"]
    # Under the other model of that name it would be another score: the alias is looked up every time.
    set_alias(tracked, "team", "champion", 1)
    assert curate(*words, *named, "--out", "named") == 2
    assert "holds scores of another configuration (large: " in capsys.readouterr().err
    assert curate(*words, "--small", "models:/none@champion", "--large", "models:/team/1", "--out", "x") == 2
    assert "none" in capsys.readouterr().err
