"""The one place that talks to a cluster's API server: that of the kubeconfig, or of the pod that this runs in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nvila_platform.cluster.connection import connect
from nvila_platform.cluster.errors import NoSuchApiError, NotThereError, cluster_errors

_TIMEOUT_S = 20
_JOBS = "trainjobs"
_WATCH_MARGIN_S = 10
# A connection that a gateway has dropped without a word is opened again after this silence.
_SILENCE_S = 60
_KUEUE = "kueue.x-k8s.io"
_KUEUE_VERSIONS = ("v1beta2", "v1beta1")


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
        self._core = client.CoreV1Api(api)

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
        name, namespace, _, _ = self._address(manifest)
        self.create(manifest)
        return JobStatus(name=name, namespace=namespace, state="Created")

    def create(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Create a job and return it as the cluster has it; raises what `submit` does."""
        name, namespace, group, version = self._address(manifest)
        with cluster_errors(f"job '{name}' in namespace '{namespace}'"):
            made = self._api.create_namespaced_custom_object(
                group, version, namespace, _JOBS, dict(manifest), _request_timeout=_TIMEOUT_S
            )
        return dict(made)

    def status(self, manifest: Mapping[str, Any]) -> JobStatus:
        """Look at a job.

        Raises:
            ConfigError: There is none of this name.
            CapabilityError: The cluster has no TrainJobs, or this user may not look at them.
            InfrastructureError: It cannot be reached.
        """
        name, namespace, group, version = self._address(manifest)
        with cluster_errors(f"job '{name}' in namespace '{namespace}'"):
            found = self._api.get_namespaced_custom_object(
                group, version, namespace, _JOBS, name, _request_timeout=_TIMEOUT_S
            )
        holding = [one for one in found.get("status", {}).get("conditions", []) if one.get("status") == "True"]
        last = holding[-1] if holding else {"type": "Created"}
        return JobStatus(name=name, namespace=namespace, state=last["type"], message=last.get("message", ""))

    def find(self, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a job as the cluster has it, or None when there is none of this name.

        Raises:
            CapabilityError: The cluster has no TrainJobs, or this user may not look at them.
            InfrastructureError: It cannot be reached.
        """
        name, namespace, group, version = self._address(manifest)
        try:
            with cluster_errors(f"job '{name}' in namespace '{namespace}'"):
                found = self._api.get_namespaced_custom_object(
                    group, version, namespace, _JOBS, name, _request_timeout=_TIMEOUT_S
                )
        except NotThereError:
            return None
        return dict(found)

    def await_change(self, job: Mapping[str, Any], timeout_s: int) -> None:
        """Wait until a job is not any more what `find` returned, or for some seconds.

        An answer that breaks off, and a version that the cluster has forgotten, end the wait early and quietly: what
        counts is what `find` says next.

        Raises:
            CapabilityError: This user may not watch jobs.
            InfrastructureError: The cluster cannot be reached.
        """
        from urllib3.exceptions import ProtocolError, ReadTimeoutError

        name, namespace, group, version = self._address(job)
        with cluster_errors(f"a watch of job '{name}' in namespace '{namespace}'"):
            answer = self._api.list_namespaced_custom_object(
                group, version, namespace, _JOBS,
                field_selector=f"metadata.name={name}", resource_version=job["metadata"].get("resourceVersion", ""),
                watch=True, timeout_seconds=timeout_s, _preload_content=False,
                _request_timeout=(_TIMEOUT_S, timeout_s + _WATCH_MARGIN_S),
            )  # fmt: skip
            try:
                next(answer.stream(amt=None), None)
            except (ProtocolError, ReadTimeoutError):
                return
            finally:
                # Not back into the pool: the rest of the stream would be read as the next answer.
                answer.close()

    def pods(self, manifest: Mapping[str, Any], labels: str) -> list[dict[str, Any]]:
        """Return pods in a job's namespace as plain mappings.

        Args:
            manifest: The job.
            labels: Selector, such as `app=x`.
        """
        return self._listed("pods", manifest, label_selector=labels)

    def events(self, manifest: Mapping[str, Any], fields: str) -> list[dict[str, Any]]:
        """Return events in a job's namespace, by a field selector."""
        return self._listed("events", manifest, field_selector=fields)

    def _listed(self, kind: str, manifest: Mapping[str, Any], **selector: str) -> list[dict[str, Any]]:
        _, namespace, _, _ = self._address(manifest)
        listing = self._core.list_namespaced_pod if kind == "pods" else self._core.list_namespaced_event
        with cluster_errors(f"{kind} in namespace '{namespace}'"):
            answer = listing(namespace, _preload_content=False, _request_timeout=_TIMEOUT_S, **selector)
            return list(json.loads(answer.data)["items"])

    def queue_message(self, job: Mapping[str, Any]) -> str:
        """Return why Kueue lets a job wait, or nothing when it says nothing.

        Raises:
            CapabilityError: This user may not look at workloads.
            InfrastructureError: The cluster cannot be reached.
        """
        _, namespace, _, _ = self._address(job)
        selector = f"{_KUEUE}/job-uid={job['metadata']['uid']}"
        for version in _KUEUE_VERSIONS:
            try:
                with cluster_errors(f"workloads in namespace '{namespace}'"):
                    found = self._api.list_namespaced_custom_object(
                        _KUEUE, version, namespace, "workloads", label_selector=selector, _request_timeout=_TIMEOUT_S
                    )
            except (NoSuchApiError, NotThereError):
                continue
            conditions = [one for item in found["items"] for one in item.get("status", {}).get("conditions", [])]
            waiting = [one for one in conditions if one["type"] == "QuotaReserved" and one["status"] == "False"]
            return str(waiting[-1].get("message", "")) if waiting else ""
        return ""

    def log(self, manifest: Mapping[str, Any], pod: str, container: str, since: str | None) -> PodLogStream:
        """Open the log of a pod, which ends with its container.

        A stream that the server ends early looks the same as one whose container has ended; the caller knows better.

        Args:
            manifest: The pod's job.
            pod: Its name.
            container: The container in it.
            since: Time of RFC 3339; lines of the same second come again. None starts at the first line.

        Raises:
            ConfigError: There is no such pod, or its container has not started.
            CapabilityError: This user may not read logs.
            InfrastructureError: The cluster cannot be reached.
        """
        _, namespace, _, _ = self._address(manifest)
        what = f"the log of pod '{pod}' in namespace '{namespace}'"
        query = [("container", container), ("follow", "true"), ("timestamps", "true")]
        if since is not None:
            query.append(("sinceTime", since))
        with cluster_errors(what):
            # The client's own method does not know sinceTime.
            answer = self._core.api_client.call_api(
                "/api/v1/namespaces/{namespace}/pods/{name}/log", "GET", {"namespace": namespace, "name": pod}, query,
                auth_settings=["BearerToken"], _preload_content=False, _return_http_data_only=True,
                _request_timeout=(_TIMEOUT_S, _SILENCE_S),
            )  # fmt: skip
        return PodLogStream(answer, what)

    def delete(self, manifest: Mapping[str, Any]) -> None:
        """Delete a job; it is gone when its pods are, which end as SIGTERM lets them.

        Raises:
            ConfigError: There is none of this name.
            CapabilityError: This user may not delete it.
            InfrastructureError: The cluster cannot be reached.
        """
        name, namespace, group, version = self._address(manifest)
        with cluster_errors(f"job '{name}' in namespace '{namespace}'"):
            self._api.delete_namespaced_custom_object(
                group, version, namespace, _JOBS, name,
                propagation_policy="Foreground", _request_timeout=_TIMEOUT_S,
            )  # fmt: skip

    def _address(self, manifest: Mapping[str, Any]) -> tuple[str, str, str, str]:
        group, version = manifest["apiVersion"].split("/")
        metadata = manifest["metadata"]
        return metadata["name"], metadata.get("namespace") or self._namespace, group, version


class PodLogStream:
    """Lines of a pod's log as they come.

    Args:
        answer: What the API server sends.
        what: Said when it breaks.
    """

    def __init__(self, answer: Any, what: str) -> None:
        self._answer = answer
        self._what = what

    def __iter__(self) -> Iterator[str]:
        """Yield lines with their line breaks; the last one lacks it where the stream ended inside of it.

        Raises:
            InfrastructureError: The connection broke.
        """
        rest = b""
        try:
            with cluster_errors(self._what):
                for piece in self._answer.stream(amt=None):
                    *lines, rest = (rest + piece).split(b"\n")
                    yield from (f"{line.decode('utf-8', errors='replace')}\n" for line in lines)
            if rest:
                yield rest.decode("utf-8", errors="replace")
        finally:
            self._answer.close()

    def stop(self) -> None:
        """End the stream, from any thread; one that has ended already stays as it is."""
        with suppress(ValueError, OSError):
            self._answer.shutdown()
