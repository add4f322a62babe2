"""The one place that talks to a cluster's API server: that of the kubeconfig, or of the pod that this runs in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nvila.errors import CapabilityError, ConfigError, InfrastructureError, NvilaError
from nvila_platform.cluster.connection import connect

_TIMEOUT_S = 20
_JOBS = "trainjobs"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """What the cluster says about a job.

    Args:
        name: Of the job.
        namespace: Where it is.
        state: Type of the last condition that holds, such as `Complete` or `Failed`; `Created` before there is one.
        message: What the cluster says about it.
    """

    name: str
    namespace: str
    state: str
    message: str = ""


class ClusterClient:
    """Creates and looks at jobs.

    Raises:
        ConfigError: There is no kubeconfig, and this is no pod.
    """

    def __init__(self) -> None:
        from kubernetes import client

        api, self._namespace = connect()
        self._api = client.CustomObjectsApi(api)

    def submit(self, manifest: Mapping[str, Any]) -> JobStatus:
        """Create a job.

        Args:
            manifest: As `train_job` makes it; without a namespace it goes where the kubeconfig's context says, or
                where this pod is.

        Raises:
            ConfigError: There is a job of this name, or the cluster refuses the manifest.
            CapabilityError: The cluster has no TrainJobs, or this user may not create them.
            InfrastructureError: It cannot be reached.
        """
        name, namespace, group, version = self._address(manifest)
        with _failures(f"job '{name}' in namespace '{namespace}'"):
            self._api.create_namespaced_custom_object(
                group, version, namespace, _JOBS, dict(manifest), _request_timeout=_TIMEOUT_S
            )
        return JobStatus(name=name, namespace=namespace, state="Created")

    def status(self, manifest: Mapping[str, Any]) -> JobStatus:
        """Look at a job.

        Raises:
            ConfigError: There is none of this name.
            CapabilityError: The cluster has no TrainJobs, or this user may not look at them.
            InfrastructureError: It cannot be reached.
        """
        name, namespace, group, version = self._address(manifest)
        with _failures(f"job '{name}' in namespace '{namespace}'"):
            found = self._api.get_namespaced_custom_object(
                group, version, namespace, _JOBS, name, _request_timeout=_TIMEOUT_S
            )
        holding = [one for one in found.get("status", {}).get("conditions", []) if one.get("status") == "True"]
        last = holding[-1] if holding else {"type": "Created"}
        return JobStatus(name=name, namespace=namespace, state=last["type"], message=last.get("message", ""))

    def delete(self, manifest: Mapping[str, Any]) -> None:
        """Delete a job and its pods.

        Raises:
            ConfigError: There is none of this name.
            CapabilityError: This user may not delete it.
            InfrastructureError: The cluster cannot be reached.
        """
        name, namespace, group, version = self._address(manifest)
        with _failures(f"job '{name}' in namespace '{namespace}'"):
            self._api.delete_namespaced_custom_object(
                group, version, namespace, _JOBS, name, _request_timeout=_TIMEOUT_S
            )

    def _address(self, manifest: Mapping[str, Any]) -> tuple[str, str, str, str]:
        group, version = manifest["apiVersion"].split("/")
        metadata = manifest["metadata"]
        return metadata["name"], metadata.get("namespace") or self._namespace, group, version


@contextmanager
def _failures(what: str) -> Iterator[None]:
    """Turn what the client raises into typed errors."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as e:
        raise _typed(e, what) from e
    except HTTPError as e:
        raise InfrastructureError(f"the cluster cannot be reached for {what}: {_line(e)}", "try again later") from e


def _typed(error: Any, what: str) -> NvilaError:
    status, said = int(error.status or 0), _said(error)
    if status == 409:
        return ConfigError(f"{what} exists already", "choose another name with --job-name, or delete it first")
    if status in (400, 422):
        return ConfigError(f"the cluster refuses {what}: {said}", "mend the value that it names")
    if status in (401, 403):
        return CapabilityError(f"this user may not touch {what}: {said}", "ask for the rights, or use another context")
    if status == 404 and "page not found" in said:
        return CapabilityError("the cluster has no TrainJobs", "install Kubeflow Trainer 2")
    if status == 404:
        return ConfigError(f"there is no {what}: {said}", "check the name and the namespace")
    return InfrastructureError(f"the cluster failed on {what} with status {status}: {said}", "try again later")


def _said(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.body or error.reason or "no reason given").strip()[:300]


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
