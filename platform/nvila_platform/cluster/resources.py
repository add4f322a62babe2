"""Resources of any kind in one namespace: read, applied, deleted and watched, over the API server's own protocol.

Writing is server-side apply with strict validation: a field that the cluster's definitions do not know is an error
instead of a field that gets lost, and what this program once set and sets no longer is taken away.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from nvila.errors import CapabilityError, ConfigError, InfrastructureError, NvilaError
from nvila_platform.cluster.connection import connect
from nvila_platform.cluster.errors import ConflictError, NotThereError, cluster_errors, said_by, status_of

logger = logging.getLogger(__name__)

MANAGER = "nvila"
_TIMEOUT_S = 20
# The API server ends a watch itself after some minutes; a shorter one finds a dead connection sooner.
_WATCH_S = 240
_GONE = 410

Resource = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of resource.

    Args:
        api: Group and version.
        plural: Its name in addresses.
        name: Its name for people.
    """

    api: str
    plural: str
    name: str

    @property
    def group(self) -> str:
        """Its API group."""
        return self.api.partition("/")[0]


INFERENCE_SERVICES = Kind(api="serving.kserve.io/v1beta1", plural="inferenceservices", name="InferenceService")
SERVING_RUNTIMES = Kind(api="serving.kserve.io/v1alpha1", plural="servingruntimes", name="ServingRuntime")
LEASES = Kind(api="coordination.k8s.io/v1", plural="leases", name="Lease")
ROUTES = Kind(api="gateway.networking.k8s.io/v1", plural="httproutes", name="HTTPRoute")


class ResourceApi:
    """Talks to the API server about resources of one namespace.

    Args:
        namespace: Instead of that of the kubeconfig's context or of this pod.

    Raises:
        ConfigError: There is no kubeconfig, and this is no pod.
    """

    def __init__(self, namespace: str = "") -> None:
        self._client, self.namespace = connect(namespace)
        self._now = 0.0

    def close(self) -> None:
        """Give the connections back."""
        self._client.rest_client.pool_manager.clear()

    @property
    def now(self) -> float:
        """Time of the API server at its last answer: the one clock that all users of a cluster share."""
        return self._now

    def groups(self) -> dict[str, list[str]]:
        """Return the API groups that the cluster serves, each with its versions.

        Raises:
            InfrastructureError: It cannot be reached.
        """
        found = self._call("GET", "/apis", "the cluster's API groups")
        return {group["name"]: [one["version"] for one in group["versions"]] for group in found["groups"]}

    def get(self, kind: Kind, name: str) -> Resource | None:
        """Return a resource, or None where there is none of this name.

        Raises:
            CapabilityError: The cluster has no such kind, or this user may not look at it.
            InfrastructureError: It cannot be reached.
        """
        try:
            return self._call("GET", self._path(kind, name), self._what(kind, name, "get"))
        except NotThereError:
            return None

    def find(self, kind: Kind, selector: str = "") -> list[Resource]:
        """Return the resources of a kind that have some labels.

        Raises:
            CapabilityError: The cluster has no such kind, or this user may not list it.
            InfrastructureError: It cannot be reached.
        """
        query = {"labelSelector": selector} if selector else {}
        what = self._what(kind, "", "list")
        try:
            return list(self._call("GET", self._path(kind), what, query=query)["items"])
        except NotThereError as e:
            raise CapabilityError(f"the cluster has no {kind.plural}.{kind.group}", "") from e

    def create(self, kind: Kind, manifest: Mapping[str, Any]) -> bool:
        """Make a resource where there is none of its name; returns whether there was none.

        Raises:
            CapabilityError: The cluster has no such kind, or this user may not do this.
            InfrastructureError: It cannot be reached.
        """
        what = self._what(kind, str(manifest["metadata"]["name"]), "create")
        try:
            self._call("POST", self._path(kind), what, query={"fieldManager": MANAGER}, body=manifest)
        except ConflictError:
            return False
        except NotThereError as e:
            raise CapabilityError(f"the cluster has no {kind.plural}.{kind.group}", "") from e
        return True

    def apply(self, kind: Kind, manifest: Mapping[str, Any]) -> Resource:
        """Make a resource what a manifest says; one with a resourceVersion only if nobody changed it since.

        Raises:
            ConflictError: Somebody changed it since.
            ConfigError: Somebody else manages it, or the cluster refuses it; the message says why.
            CapabilityError: The cluster has no such kind, or this user may not do this.
            InfrastructureError: It cannot be reached.
        """
        name = str(manifest["metadata"]["name"])
        body = dict(manifest) | {"metadata": dict(manifest["metadata"]) | {"namespace": self.namespace}}
        query = {"fieldManager": MANAGER, "fieldValidation": "Strict"}
        try:
            return self._call("PATCH", self._path(kind, name), self._what(kind, name, "patch"), query=query, body=body)
        except NotThereError as e:
            raise CapabilityError(f"the cluster has no {kind.plural}.{kind.group}", "") from e

    def delete(self, kind: Kind, name: str) -> None:
        """Delete a resource; none of this name is no error.

        Raises:
            CapabilityError: This user may not.
            InfrastructureError: The cluster cannot be reached.
        """
        try:
            self._call("DELETE", self._path(kind, name), self._what(kind, name, "delete"))
        except NotThereError:
            logger.debug("%s %s is gone already", kind.name, name)

    def watch(self, kind: Kind, name: str, *, timeout_s: float) -> Iterator[Resource | None]:
        """Yield a resource now and after every change of it, None when it is gone, until the time is over.

        A connection that drops is made again from the last version seen; when that version is too old for the API
        server, the resource is read anew.

        Args:
            kind: What to watch.
            name: Which one.
            timeout_s: Longest time, by the clock of this machine.

        Raises:
            CapabilityError: This user may not.
            InfrastructureError: The cluster cannot be reached, not even for reading anew.
        """
        deadline = time.monotonic() + timeout_s
        version = ""
        while (left := deadline - time.monotonic()) > 0:
            if not version:
                found = self.get(kind, name)
                yield found
                version = found["metadata"]["resourceVersion"] if found is not None else self._list_version(kind, name)
            seen = version
            for event in self._events(kind, name, version, min(left, _WATCH_S)):
                version = self._version_after(event)
                if not version:
                    break
                if event["type"] in ("ADDED", "MODIFIED"):
                    yield event["object"]
                elif event["type"] == "DELETED":
                    yield None
            if version == seen:
                # Nothing came: not again at once, should the server end every watch that it is asked for.
                time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))

    def _list_version(self, kind: Kind, name: str) -> str:
        query = {"fieldSelector": f"metadata.name={name}"}
        found = self._call("GET", self._path(kind), self._what(kind, name, "list"), query=query)
        return str(found["metadata"]["resourceVersion"])

    @staticmethod
    def _version_after(event: Mapping[str, Any]) -> str:
        """Return the version that a watch goes on from; empty when everything has to be read anew."""
        if event["type"] == "ERROR":
            status = event["object"]
            if status.get("code") != _GONE:
                logger.warning("the watch ended: %s", status.get("message", status))
            return ""
        return str(event["object"]["metadata"]["resourceVersion"])

    def _events(self, kind: Kind, name: str, version: str, seconds: float) -> Iterator[dict[str, Any]]:
        from urllib3.exceptions import HTTPError

        query = {
            "watch": "true",
            "fieldSelector": f"metadata.name={name}",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(max(1, round(seconds))),
        }
        what = self._what(kind, name, "watch")
        with cluster_errors(what, _typed):
            try:
                answer = self._send("GET", self._path(kind), query, None, stream=True, timeout_s=seconds + 5)
            except Exception as e:
                if getattr(e, "status", 0) != _GONE:
                    raise
                yield {"type": "ERROR", "object": {"code": _GONE}}
                return
        try:
            for line in _lines(answer):
                yield json.loads(line)
        except (HTTPError, ValueError) as e:
            logger.info("the watch of %s was cut: %s", what, type(e).__name__)
        finally:
            answer.close()
            answer.release_conn()

    def _call(
        self,
        method: str,
        path: str,
        what: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> Resource:
        from kubernetes.client import ApiException

        with cluster_errors(what, _typed):
            try:
                answer = self._send(method, path, query or {}, body, stream=False, timeout_s=_TIMEOUT_S)
            except ApiException as e:
                self._read_clock(e.headers or {})
                raise
            self._read_clock(answer.headers)
            found: Resource = json.loads(answer.data)
            return found

    def _read_clock(self, headers: Mapping[str, str]) -> None:
        if "Date" in headers:
            self._now = parsedate_to_datetime(headers["Date"]).timestamp()

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None,
        *,
        stream: bool,
        timeout_s: float,
    ) -> Any:
        headers = {"Accept": "application/json"}
        if method == "PATCH":
            headers["Content-Type"] = "application/apply-patch+yaml"
        answer, _, _ = self._client.call_api(
            path,
            method,
            query_params=list(query.items()),
            header_params=headers,
            body=dict(body) if body is not None else None,
            auth_settings=["BearerToken"],
            response_type=None,
            _preload_content=False,
            _request_timeout=(_TIMEOUT_S, timeout_s),
        )
        return answer if stream else _Read(answer)

    def _path(self, kind: Kind, name: str = "") -> str:
        path = f"/apis/{kind.api}/namespaces/{self.namespace}/{kind.plural}"
        return f"{path}/{name}" if name else path

    def _what(self, kind: Kind, name: str, verb: str) -> str:
        one = f"{kind.name} '{name}'" if name else f"every {kind.name}"
        return f"{verb} {one} in namespace '{self.namespace}'"


class _Read:
    """An answer that was read whole, so that its connection can serve the next request."""

    def __init__(self, answer: Any) -> None:
        self.data = answer.data
        self.headers = answer.headers


def _lines(answer: Any) -> Iterator[bytes]:
    """Yield the lines of a stream as they come."""
    buffer = b""
    for piece in answer.stream(amt=None, decode_content=False):
        *whole, buffer = (buffer + piece).split(b"\n")
        yield from filter(None, whole)


def _typed(error: Any, what: str) -> NvilaError:
    status = int(error.status or 0)
    said, text = status_of(error), said_by(error)
    if status == 404:
        return NotThereError(text)
    if status == 409 and any(one.get("reason") == "FieldManagerConflict" for one in _causes(said)):
        return ConfigError(f"cannot {what}, somebody else manages it: {text}", "choose another name with --name")
    if status == 409:
        return ConflictError(f"cannot {what}: {text}", "look at it with nvila status")
    # A webhook that refuses a value says 403 by default, as if it were about rights.
    if status in (400, 422) or (status == 403 and "admission webhook" in text):
        return ConfigError(f"the cluster refuses to {what}: {text}", "mend the value that it names")
    if status == 401:
        return CapabilityError(
            f"cannot {what}: the cluster no longer takes this user's token", "log in again and repeat the command"
        )
    if status == 403:
        return CapabilityError(
            f"this user may not {what}: {text}", "ask for the right; the roles of charts/nvila-platform grant it"
        )
    return InfrastructureError(f"the cluster failed to {what} with status {status}: {text}", "try again later")


def _causes(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list((said.get("details") or {}).get("causes") or [])
