"""Data sets as inputs of runs in MLflow: what was read, in which role, with the digest of the store."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from nvila_platform.tracking_buffer import Event

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from nvila_platform.store import ArtifactRef

# MLflow's own name of the tag that its interface shows beside a data set.
_CONTEXT = "mlflow.data.context"
# The column of its database.
_DIGEST_LENGTH = 36


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInput:
    """One data set that a run reads.

    Args:
        name: Name in MLflow.
        context: What it is read for: training, evaluation, calibration, curation.
        digest: Digest of the artifact.
        uri: Where the store has it.
        numbers: Counts, such as samples.
    """

    name: str
    context: str
    digest: str
    uri: str
    numbers: Mapping[str, float]

    @classmethod
    def of(cls, ref: ArtifactRef, context: str, numbers: Mapping[str, float]) -> DatasetInput:
        """Return an artifact of the store as an input.

        What it is read for is part of the name, because a run has each data set in MLflow once, in one context.
        """
        return cls(name=f"{ref.step} for {context}", context=context, digest=ref.digest, uri=ref.uri, numbers=numbers)

    def event(self) -> Event:
        """Return the form that waits for MLflow."""
        return Event(kind="dataset", values={"dataset": json.dumps(asdict(self))})


def send_datasets(client: MlflowClient, run_id: str, events: Sequence[Event]) -> None:
    """Log inputs of a run; the same one again changes nothing."""
    from mlflow.entities import Dataset, InputTag
    from mlflow.entities import DatasetInput as Logged
    from mlflow.exceptions import MlflowException

    inputs = []
    for event in events:
        found = json.loads(str(event.values["dataset"]))
        dataset = Dataset(
            name=found["name"],
            digest=found["digest"][:_DIGEST_LENGTH],
            source_type="nvila",
            source=json.dumps({"uri": found["uri"], "digest": found["digest"]}),
            profile=json.dumps(found["numbers"]),
        )
        inputs.append(Logged(dataset, [InputTag(_CONTEXT, found["context"])]))
    try:
        client.log_inputs(run_id, inputs)
    except MlflowException as e:
        # Two runs that name a data set first at the same moment both make it, and MLflow fails one: now it is there.
        if "unique constraint" not in str(e).lower():
            raise
        client.log_inputs(run_id, inputs)
