"""What an API server refuses, as typed errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nvila.errors import CapabilityError, ConfigError, InfrastructureError, NvilaError


class NotThereError(ConfigError):
    """There is no resource of this name."""


class NoSuchApiError(CapabilityError):
    """The cluster does not know resources of this kind."""


class TakenError(ConfigError):
    """There is a resource of this name already."""


@contextmanager
def cluster_errors(what: str) -> Iterator[None]:
    """Turn what the client raises into typed errors.

    Args:
        what: Resource that is asked for, with its namespace.

    Raises:
        ConfigError: There is none of this name, there is one already, or the cluster refuses it.
        CapabilityError: The cluster does not know such resources, or this user may not touch them.
        InfrastructureError: The cluster cannot be reached, or fails.
    """
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as e:
        raise _typed(e, what) from e
    except HTTPError as e:
        raise InfrastructureError(
            f"the cluster cannot be reached for {what}: {first_line(e)}", "try again later"
        ) from e


def _typed(error: Any, what: str) -> NvilaError:
    status, said = int(error.status or 0), _said(error)
    if status == 409:
        return TakenError(f"{what} exists already", "choose another name with --job-name, or delete it first")
    # A webhook that refuses a value says 403 by default, as if it were about rights.
    if status in (400, 422) or (status == 403 and "admission webhook" in said):
        return ConfigError(f"the cluster refuses {what}: {said}", "mend the value that it names")
    if status in (401, 403):
        return CapabilityError(f"this user may not touch {what}: {said}", "ask for the rights, or use another context")
    if status == 404 and "page not found" in said:
        return NoSuchApiError("the cluster has no TrainJobs", "install Kubeflow Trainer 2")
    if status == 404:
        return NotThereError(f"there is no {what}: {said}", "check the name and the namespace")
    return InfrastructureError(f"the cluster failed on {what} with status {status}: {said}", "try again later")


def _said(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.body or error.reason or "no reason given").strip()[:300]


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says, cut to a readable length."""
    return str(error).strip().partition("\n")[0][:300]
