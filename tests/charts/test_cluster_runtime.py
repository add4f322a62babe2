"""charts/nvila-serving with a runtime of the whole cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from tests.charts.conftest import Document, Helm
    from tests.charts.crd_validation import CrdSchemas

    Render = Callable[..., list[Document]]

CHART = Path(__file__).resolve().parents[2] / "charts" / "nvila-serving"
MATRIX: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "serving_matrix.yaml").read_text("utf-8"))
RUNTIMES = {"ServingRuntime", "ClusterServingRuntime"}


def resources(render: Render, values: dict[str, Any]) -> tuple[Document, Document]:
    """Return the runtime and the InferenceService."""
    documents = render(CHART, values, extra=("--api-versions", "keda.sh/v1alpha1"))
    (runtime,) = (document for document in documents if document["kind"] in RUNTIMES)
    (service,) = (document for document in documents if document["kind"] == "InferenceService")
    return runtime, service


@pytest.mark.parametrize("row", ["defaults", "closed", "registered", "volumes", "labels"])
def test_it_is_the_same_runtime_under_a_name_of_its_own(render: Render, crds: CrdSchemas, row: str) -> None:
    own, _ = resources(render, MATRIX[row])
    shared, service = resources(render, {**MATRIX[row], "runtime": {"clusterWide": True}})
    assert crds.errors(shared) == []
    assert own["kind"] == "ServingRuntime"
    assert own["metadata"]["namespace"] == "models"
    assert shared["kind"] == "ClusterServingRuntime"
    assert "namespace" not in shared["metadata"]
    # Another namespace may have a release of the same name.
    assert shared["metadata"]["name"] == "models-demo-nvila-serving"
    assert service["spec"]["predictor"]["model"]["runtime"] == shared["metadata"]["name"]
    assert shared["spec"] == own["spec"]
    assert shared["metadata"]["labels"] == own["metadata"]["labels"]


def test_a_name_that_is_too_long_with_the_namespace_is_refused(helm: Helm) -> None:
    values = {"runtime": {"clusterWide": True}, "fullnameOverride": "e" * 48}
    place = ("--namespace", "n" * 20)
    said = helm.run("template", "demo", CHART, *place, "--values", "-", stdin=yaml.safe_dump(values))
    assert said.returncode != 0
    assert "which has 69 characters, at most 63 fit: set fullnameOverride" in said.stderr
