"""Images, settings and credentials that a profile gives to the tasks of a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nvila import __version__
from nvila.errors import ConfigError
from nvila_pipelines.compile import GRAPHS, compile_graph
from nvila_pipelines.graphs.profile import NOWHERE, Placement, Profile, read_profile
from nvila_platform.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
KIND = ROOT / "examples" / "kind-profile.yaml"


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_task_of_every_graph_runs_where_the_kind_profile_says(graph: str, tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all(compile_graph(graph, tmp_path / "g.yaml", read_profile(KIND)).read_text()))
    executors: dict[str, Any] = documents[0]["deploymentSpec"]["executors"]
    images = {name: executor["container"]["image"] for name, executor in executors.items() if "container" in executor}
    assert set(images.values()) == {f"nvila/train:{__version__}-cpu"}
    platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert platform.keys() == images.keys()
    for placed in platform.values():
        (settings,) = placed["configMapAsEnv"]
        assert settings["configMapName"] == "nvila-platform-settings"
        (secret,) = placed["secretAsEnv"]
        assert {one["envVar"] for one in secret["keyToEnv"]} == {"NVILA_S3_ACCESS_KEY", "NVILA_S3_SECRET_KEY"}


def labels_of(graph: str, profile: Profile, folder: Path) -> dict[str, dict[str, str]]:
    """Return the labels of the tasks' pods, of those that have any."""
    documents = list(yaml.safe_load_all(compile_graph(graph, folder / "g.yaml", profile).read_text()))
    if len(documents) == 1:
        return {}
    placed = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {name: one["podMetadata"]["labels"] for name, one in placed.items() if "podMetadata" in one}


def test_pods_that_train_carry_the_label_that_the_monitor_looks_for(tmp_path: Path) -> None:
    kind = read_profile(KIND)
    watched = {"nvila.dev/metrics": "training"}
    assert labels_of("lifecycle", kind, tmp_path) == {"exec-train": watched}
    assert labels_of("tune", kind, tmp_path) == {"exec-tune-model": watched}
    # The nodes of a job train then, and the task follows them.
    job = Profile(tasks={"train": Placement(launcher="trainjob", claims={"work": "/data"})})
    assert labels_of("lifecycle", job, tmp_path) == {}
    # A graph without a profile is one document, which every Kubeflow takes.
    assert labels_of("lifecycle", NOWHERE, tmp_path) == {}


def test_the_settings_of_the_kind_profile_are_ones_that_the_project_reads() -> None:
    defaults = read_profile(KIND).defaults
    (names,) = (set(keys.values()) for keys in defaults.config_maps.values())
    values = dict.fromkeys(names, "x") | {"NVILA_S3_SECURE": "false", "NVILA_LOG_FORMAT": "json"}
    assert "NVILA_METRICS_ADDRESS" in names
    values |= {"NVILA_STORE_URI": "s3://bucket/prefix", "NVILA_TRACKING_URI": "http://m"}
    loaded = Settings.load(environ=values | {"NVILA_METRICS_ADDRESS": "0.0.0.0:9464"})
    assert loaded.metrics_address == "0.0.0.0:9464"
    assert loaded.store_uri == "s3://bucket/prefix"
    assert loaded.tracking_uri == "http://m"


@pytest.mark.parametrize(
    ("image", "good"),
    [
        ("nvila/train:0.1.0", True),
        ("registry.example.com:5000/team/train:1.2", True),
        ("ghcr.io/nvila/train@sha256:" + "a" * 64, True),
        ("nvila/train", False),
        ("registry.example.com:5000/team/train", False),
        ("nvila/train:", False),
        ("two words:1", False),
    ],
)
def test_an_image_names_its_version(tmp_path: Path, image: str, good: bool) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump({"defaults": {"image": image}}))
    if good:
        assert read_profile(path).defaults.image == image
    else:
        with pytest.raises(ConfigError, match=r"defaults\.image"):
            read_profile(path)
