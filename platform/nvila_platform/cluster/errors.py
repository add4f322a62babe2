"""What an API server refuses, as typed errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nvila.errors import CapabilityError, ConfigError, InfrastructureError, NvilaError


class NotThereError(ConfigError):
    """There is no resource of this name."""


class NoSuchApiError(CapabilityError):
    """The cluster does not know resources of this kind."""


class TakenError(ConfigError):
    """There is a resource of this name already."""


class ConflictError(InfrastructureError):
    """Somebody else changed the resource meanwhile; it may pass when it is tried again."""


Typed = Callable[[Any, str], NvilaError]


@contextmanager
def cluster_errors(what: str, typed: Typed | None = None) -> Iterator[None]:
    """Turn what the client raises into typed errors.

    Args:
        what: Resource that is asked for, with its namespace.
        typed: Names what the API server refuses, from the client's exception and `what`; None does it for jobs.

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
        raise (typed or _job_error)(e, what) from e
    except (HTTPError, OSError) as e:
        raise InfrastructureError(f"the cluster cannot be reached ({what}): {first_line(e)}", "try again later") from e


def _job_error(error: Any, what: str) -> NvilaError:
    status, said = int(error.status or 0), said_by(error)
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


def said_by(error: Any) -> str:
    """Return what the API server says of a refusal, cut to a readable length."""
    return str(status_of(error).get("message") or error.body or error.reason or "no reason given").strip()[:500]


def status_of(error: Any) -> dict[str, Any]:
    """Return the `Status` that came with a refusal; empty where none came."""
    body = error.body
    try:
        found = json.loads(body.decode("utf-8", "replace") if isinstance(body, bytes) else body)
    except (ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says, cut to a readable length."""
    return str(error).strip().partition("\n")[0][:300]
