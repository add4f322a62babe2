"""Where a rollout stands, kept in the cluster: a Lease says who works on an endpoint, its annotations how far that is.

Not on the InferenceService: KServe copies annotations of it to the pods, so every note would restart them.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import uuid
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from nvila.errors import ConfigError
from nvila_platform.cluster.errors import ConflictError
from nvila_platform.cluster.inference_service import ENDPOINT_LABEL, Revision
from nvila_platform.cluster.resources import LEASES, Resource, ResourceApi

# `starting`: pods of the target are made ready, without traffic; `stepping`: it gets its share and is watched;
# `promoting`: it becomes the stable one; `naming`: the registry learns of it; `undoing`: it is taken away again.
Phase = Literal["starting", "stepping", "promoting", "naming", "undoing"]

# Who does not renew for this long is taken for gone.
LEASE_S = 60
RENEW_S = 15
_STATE = "nvila.dev/rollout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a rollout was asked to do; whoever continues it does the same.

    Args:
        target: The revision that shall serve.
        steps: Its shares of the traffic in percent, one after the other.
        interval_s: How long each is watched.
        timeout_s: Longest wait for pods, and for enough requests after an interval.
        limits: Limits of live metrics, as in a policy; None watches nothing.
        prometheus: Address of Prometheus.
        alias: Alias of the registry that the version gets in the end; empty for none.
        labels: Labels of the InferenceService.
    """

    target: Revision
    steps: tuple[int, ...] = ()
    interval_s: float = 0
    timeout_s: float = 600
    limits: dict[str, Any] | None = None
    prometheus: str = ""
    alias: str = ""
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Everything that is known about an endpoint's revisions.

    Args:
        live: What serves; None before the first deployment.
        previous: What served before.
        labels: Labels of the InferenceService.
        plan: The rollout under way.
        phase: Where it is.
        step: Index of its step.
        since: When its step began, by the API server's clock.
        reason: Why it is undone.
        outcome: How the last rollout ended: `state`, `revision`, `reason`, `time`.
    """

    live: Revision | None = None
    previous: Revision | None = None
    labels: dict[str, str] = field(default_factory=dict)
    plan: Plan | None = None
    phase: Phase = "starting"
    step: int = 0
    since: float = 0.0
    reason: str = ""
    outcome: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text that an annotation holds."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> State:
        """Rebuild a state."""
        found = json.loads(text)
        plan = found["plan"]
        if plan is not None:
            found["plan"] = Plan(**plan | {"target": Revision.from_dict(plan["target"]), "steps": tuple(plan["steps"])})
        for name in ("live", "previous"):
            found[name] = Revision.from_dict(found[name]) if found[name] is not None else None
        return cls(**found)


def lease_name(endpoint: str) -> str:
    """Return the name of the Lease of an endpoint."""
    return f"{endpoint}-rollout"


def read_state(lease: Resource | None) -> State:
    """Return what a Lease says; a new endpoint's where there is none."""
    text = ((lease or {}).get("metadata", {}).get("annotations") or {}).get(_STATE)
    return State.from_json(text) if text else State()


class RolloutStore:
    """Reads and writes the state of one endpoint, as the only one who works on it.

    Args:
        api: The cluster.
        endpoint: Name of the endpoint.
    """

    def __init__(self, api: ResourceApi, endpoint: str) -> None:
        self._api = api
        self._endpoint = endpoint
        self._version = ""
        self.state = State()
        self.holder = f"{_user()}@{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"

    def claim(self, *, take_over: bool = False) -> State:
        """Become the one who works on the endpoint, and return where it stands.

        Args:
            take_over: Also from somebody who is at work; they notice with their next step and stop.

        Raises:
            ConfigError: Somebody else is at work.
        """
        name = lease_name(self._endpoint)
        lease = self._api.get(LEASES, name)
        if lease is None:
            # Empty, so that the write below, which knows a version, decides between two who come at once.
            self._api.create(LEASES, self._manifest() | {"spec": {}})
            lease = self._api.get(LEASES, name)
            if lease is None:
                raise ConfigError(f"the state of endpoint '{self._endpoint}' was deleted", "try again")
        spec = lease.get("spec") or {}
        idle_s = self._api.now - _seconds(spec.get("renewTime"))
        holder = str(spec.get("holderIdentity") or "")
        if holder and idle_s < LEASE_S and not take_over and not _is_gone(holder):
            raise ConfigError(
                f"{holder} works on endpoint '{self._endpoint}', last seen {idle_s:.0f} s ago",
                f"follow it with: nvila status {self._endpoint} --watch",
            )
        self._version = lease["metadata"]["resourceVersion"]
        self.state = read_state(lease)
        self.save(self.state)
        return self.state

    def save(self, state: State) -> None:
        """Write where the rollout stands, and that somebody is at work.

        Raises:
            ConfigError: Somebody else took over.
        """
        self._write(state, self.holder)

    def change(self, **changed: Any) -> State:
        """Write the state with some fields changed."""
        self.save(replace(self.state, **changed))
        return self.state

    def release(self) -> None:
        """Say that nobody is at work, so that the next one need not wait.

        What is written last is read again: an interrupt may have come between a write and its answer.
        """
        lease = self._api.get(LEASES, lease_name(self._endpoint))
        if lease is not None and (lease.get("spec") or {}).get("holderIdentity") == self.holder:
            self._version = lease["metadata"]["resourceVersion"]
            self._write(read_state(lease), "")

    def _write(self, state: State, holder: str) -> None:
        now = datetime.fromtimestamp(self._api.now, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        manifest = self._manifest()
        manifest["metadata"] |= {"annotations": {_STATE: state.to_json()}, "resourceVersion": self._version}
        manifest["spec"] = {"holderIdentity": holder, "leaseDurationSeconds": LEASE_S, "renewTime": now}
        try:
            written = self._api.apply(LEASES, manifest)
        except ConflictError as e:
            raise ConfigError(
                f"somebody else took over endpoint '{self._endpoint}'",
                f"follow it with: nvila status {self._endpoint} --watch",
            ) from e
        self._version = written["metadata"]["resourceVersion"]
        self.state = state

    def _manifest(self) -> dict[str, Any]:
        metadata = {"name": lease_name(self._endpoint), "labels": {ENDPOINT_LABEL: self._endpoint}}
        return {"apiVersion": LEASES.api, "kind": LEASES.name, "metadata": metadata}


def _is_gone(holder: str) -> bool:
    """Whether who holds a Lease was a process of this machine that is there no more; then nobody need wait for it."""
    who, _, rest = holder.partition("/")
    pid = rest.partition("/")[0]
    if who.rpartition("@")[2] != socket.gethostname() or not pid.isdecimal():
        return False
    if int(pid) == os.getpid():  # an earlier deployment of this very process, which could not say that it ended
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it belongs to somebody else
        return False
    return False


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user has no name
        return "somebody"


def _seconds(text: str | None) -> float:
    return datetime.fromisoformat(text).timestamp() if text else 0.0
