"""The definitions that are written here take what charts render and refuse what is misspelt or moved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from tests.charts.conftest import Document
    from tests.charts.crd_validation import CrdSchemas

    Render = Callable[..., list[Document]]

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
PLATFORM = ROOT / "charts" / "nvila-platform"
MATRIX: dict[str, dict[str, Any]] = yaml.safe_load((HERE / "platform_matrix.yaml").read_text("utf-8"))


def rendered(render: Render, row: str, kind: str, api: str) -> Document:
    """Return the one resource of a kind, as it may be changed."""
    found = [one for one in render(PLATFORM, MATRIX[row], extra=("--api-versions", api)) if one["kind"] == kind]
    assert len(found) == 1
    copy: Document = json.loads(json.dumps(found[0]))
    return copy


@pytest.mark.parametrize("api", ["kueue.x-k8s.io/v1beta1", "kueue.x-k8s.io/v1beta2"])
@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("LocalQueue", {"clusterQueues": "x"}, "'clusterQueues' was unexpected"),
        ("LocalQueue", {"clusterQueue": 7}, "7 is not of type 'string'"),
        ("ResourceFlavor", {"nodeSelector": {}}, "'nodeSelector' was unexpected"),
        ("ClusterQueue", {"flavors": []}, "'flavors' was unexpected"),
        ("ClusterQueue", {"resourceGroups": [{"coveredResources": ["cpu"]}]}, "'flavors' is a required property"),
    ],
)
def test_queues(render: Render, crds: CrdSchemas, api: str, kind: str, change: dict[str, Any], said: str) -> None:
    document = rendered(render, "queue-of-gpus", kind, api)
    assert document["apiVersion"] == api
    assert crds.errors(document) == []
    document["spec"].update(change)
    assert any(said in error for error in crds.errors(document)), crds.errors(document)


def test_a_quota_is_a_quantity(render: Render, crds: CrdSchemas) -> None:
    document = rendered(render, "queue-of-gpus", "ClusterQueue", "kueue.x-k8s.io/v1beta2")
    quota = document["spec"]["resourceGroups"][0]["flavors"][0]["resources"][0]
    for value, valid in (("128", True), (8, True), ("1.5Ti", True), ("500m", True), ("many", False), (-1, False)):
        quota["nominalQuota"] = value
        assert (crds.errors(document) == []) is valid, value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"selectors": {}}, "'selectors' was unexpected"),
        ({"envFrom": [{"configMap": {"name": "x"}}]}, "'configMap' was unexpected"),
        ({"env": [{"value": "x"}]}, "'name' is a required property"),
    ],
)
def test_settings_of_every_task(render: Render, crds: CrdSchemas, change: dict[str, Any], said: str) -> None:
    document = rendered(render, "pod-default", "PodDefault", "kubeflow.org/v1alpha1")
    assert crds.errors(document) == []
    document["spec"].update(change)
    assert any(said in error for error in crds.errors(document)), crds.errors(document)


def test_every_definition_names_its_file_and_is_told_of() -> None:
    told = (HERE / "definitions" / "README.md").read_text(encoding="utf-8")
    for path in sorted((HERE / "definitions").glob("*.yaml")):
        group, _, plural = path.stem.partition("_")
        assert yaml.safe_load(path.read_text("utf-8"))["spec"]["names"]["plural"] == plural
        assert group in told
