"""Which data sets a step reads, for its run in MLflow."""

from __future__ import annotations

from collections.abc import Mapping

from nvila.errors import NvilaError
from nvila_platform.store import ArtifactRef, ArtifactStore
from nvila_platform.tracking_datasets import DatasetInput

# What steps read data for. The others read results.
CONTEXTS = {
    "curate": "curation",
    "train": "training",
    "quantize": "calibration",
    "evaluate-wide": "evaluation",
    "evaluate-quantized": "evaluation",
    "serve": "serving",
}
_DATA = ("data", "selection")


def datasets_of(step: str, inputs: Mapping[str, ArtifactRef], store: ArtifactStore) -> list[DatasetInput]:
    """Return the data sets among the inputs of a step; one whose manifest cannot be read has no numbers.

    Args:
        step: Step in the table.
        inputs: References by input name.
        store: Where their manifests are.
    """
    if step not in CONTEXTS:
        return []
    found = [inputs[name] for name in _DATA if name in inputs]
    return [DatasetInput.of(ref, CONTEXTS[step], _numbers(ref, store)) for ref in found]


def _numbers(ref: ArtifactRef, store: ArtifactStore) -> Mapping[str, float]:
    try:
        return dict(store.manifest(ref).metrics)
    except NvilaError:
        return {}
