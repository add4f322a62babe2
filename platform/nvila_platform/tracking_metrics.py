"""Hands metrics to MLflow, at a fifth of what its client takes of the interpreter where MLflow is a server.

The thread that trains needs the interpreter between its kernels, and waits while another thread has it. MLflow's client
builds four Python objects for every value and turns them to JSON in Python: 29 ms for 1000 values, 6 ms here.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from nvila_platform.tracking_buffer import Event

if TYPE_CHECKING:
    from mlflow import MlflowClient

_LOG_BATCH = "/api/2.0/mlflow/runs/log-batch"
_MAX_NAME_LENGTH = 250
# A run has some tens of names, and says each of them at every step.
_NAMES_KEPT = 4096


class Value(NamedTuple):
    """One value of one metric, `time_ms` in milliseconds since 1970."""

    name: str
    value: float
    time_ms: int
    step: int


SendValues = Callable[[Sequence[Value]], None]


def values_of(events: Sequence[Event]) -> list[Value]:
    """Return the values of events of the kind `metrics`, in order, under names that MLflow takes."""
    return [
        Value(clean_name(name), float(value), event.time_ms, event.step)
        for event in events
        for name, value in event.values.items()
    ]


def values_sender(client: MlflowClient, run_id: str) -> SendValues:
    """Return what sends at most 1000 values of a run in one request, and raises what MLflow's client raises."""
    address = str(client.tracking_uri)
    if not address.startswith(("http://", "https://")):
        return lambda values: _through_client(client, run_id, values)
    return lambda values: _post(address, run_id, values)


@lru_cache(maxsize=_NAMES_KEPT)
def clean_name(name: str) -> str:
    """Return the nearest name that MLflow accepts for a metric, parameter or tag.

    Example:
        >>> clean_name("accuracy (top 5%)")
        'accuracy _top 5__'
    """
    plain = re.sub(r"[^/\w.\- :]", "_", name)
    # MLflow also refuses names that differ from their own normal form as a path.
    parts = ["_" if part in (".", "..") else part for part in plain.split("/") if part]
    return posixpath.join(*parts)[:_MAX_NAME_LENGTH].rstrip("/") if parts else "unnamed"


def _through_client(client: MlflowClient, run_id: str, values: Sequence[Value]) -> None:
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(one.name, one.value, one.time_ms, one.step) for one in values])


def _post(address: str, run_id: str, values: Sequence[Value]) -> None:
    """Send values as MLflow's REST interface takes them, with the credentials and limits of its client."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request_safe

    metrics = [
        {"key": name, "value": value if math.isfinite(value) else _spelled(value), "timestamp": time_ms, "step": step}
        for name, value, time_ms, step in values
    ]
    # Credentials may change while a run lasts. MLflow has no annotations for these two.
    credentials = get_default_host_creds(address)  # type: ignore[no-untyped-call]
    body = {"run_id": run_id, "metrics": metrics}
    http_request_safe(credentials, _LOG_BATCH, "POST", json=body)  # type: ignore[no-untyped-call]


def _spelled(value: float) -> str:
    """Return how JSON of protocol buffers writes what JSON has no number for."""
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
