"""Waiting for a job: what it waits for is told, what cannot get better ends the wait."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvila.errors import CapabilityError, InfrastructureError, NvilaError
from nvila_platform.cluster.client import ClusterClient
from nvila_platform.cluster.logs import PodLogs, Say
from nvila_platform.cluster.placement import JobPlacement
from nvila_platform.cluster.pods import (
    Finding,
    Pod,
    PodHistory,
    has_started,
    place_of,
    selector,
    why_not_made,
    why_pending,
)
from nvila_platform.cluster.trainjob import NODE

_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0
_SHORTEST_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait.

    Args:
        look_s: Between two looks at the pods, when the job itself does not change.
        start_s: For an image or a container that does not come: registries fail for a moment, secrets come late.
        api_s: For an API server that is away.
        stop_s: For nodes that were asked to end; a step's pod gets 30 seconds itself.
        gone_s: Beyond the nodes' own time, for an old job to be gone.
        drain_s: For the last lines of pods that have ended.
    """

    look_s: int = 10
    start_s: float = 180
    api_s: float = 900
    stop_s: float = 20
    gone_s: float = 60
    drain_s: float = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Why a job did not come to its end.

    Args:
        finding: What its pods say, if they say anything.
        message: What the cluster says about the job.
        over: Whether the job has failed; otherwise it still holds, or waits for, its nodes.
        deleted: Whether somebody took it away.
        memory: What each node may use.
    """

    finding: Finding | None = None
    message: str = ""
    over: bool = True
    deleted: bool = False
    memory: str | None = None


def conditions(job: Mapping[str, Any]) -> dict[str, str]:
    """Return the conditions of a job that hold, with what the cluster says about them."""
    holding = [one for one in job.get("status", {}).get("conditions", []) if one.get("status") == "True"]
    return {one["type"]: str(one.get("message") or one.get("reason") or "") for one in holding}


class JobProgress:
    """Looks at a job and its pods until it has ended.

    Args:
        client: Of its cluster.
        job: As the cluster has it.
        placement: What its nodes were to be.
        logs: Follow its pods.
        say: Told what it waits for, once each.
        patience: How long to wait for what.
    """

    def __init__(
        self,
        client: ClusterClient,
        job: Mapping[str, Any],
        placement: JobPlacement,
        logs: PodLogs,
        say: Say,
        patience: Patience,
    ) -> None:
        self._client, self._job, self._placement = client, job, placement
        self._logs, self._say, self._patience = logs, say, patience
        self._name = str(job["metadata"]["name"])
        self._history = PodHistory()
        self._told: str = ""
        self._pending_since: float | None = None
        self._problem_since: float | None = None
        self._started = False
        self._blind: set[str] = set()

    def wait(self) -> Cause | None:
        """Wait for the end; None says that the job is complete.

        Raises:
            InfrastructureError: The API server was away for too long.
            CapabilityError: This user may not look at jobs.
        """
        away_since: float | None = None
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                job = self._client.find(self._job)
                if job is None:
                    return Cause(deleted=True, finding=self._history.cause)
                done, cause = self._look(job)
                if done:
                    return cause
                self._rest(job)
            except InfrastructureError as e:
                now = time.monotonic()
                away_since = away_since or now
                if now - away_since > self._patience.api_s:
                    raise
                self._tell(f"{e.message}; waiting for it, the job goes on")
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
                continue
            away_since, wait_s = None, _FIRST_WAIT_S

    def _rest(self, job: Mapping[str, Any]) -> None:
        start = time.monotonic()
        self._client.await_change(job, self._patience.look_s)
        # A server that ends every watch at once must not be asked without a pause.
        time.sleep(max(0.0, _SHORTEST_S - (time.monotonic() - start)))

    def _look(self, job: Mapping[str, Any]) -> tuple[bool, Cause | None]:
        state = conditions(job)
        pods = self._pods(job)
        self._history.look(pods)
        self._logs.look(pods)
        if "Complete" in state:
            return True, None
        if "Failed" in state:
            return True, Cause(finding=self._history.cause, message=state["Failed"], memory=self._placement.memory)
        if "Suspended" in state:
            self._pending_since = None
            self._tell(self._queue_message(job, state["Suspended"]))
            return False, None
        return self._starting(pods, job)

    def _starting(self, pods: Sequence[Pod], job: Mapping[str, Any]) -> tuple[bool, Cause | None]:
        """Judge whether what keeps nodes from starting may pass."""
        now = time.monotonic()
        running = [pod for pod in pods if has_started(pod)]
        if len(running) >= self._placement.nodes:
            self._pending_since = self._problem_since = None
            if not self._started:
                self._started = True
                self._tell(f"{len(running)} nodes have started: {', '.join(map(place_of, running))}")
            return False, None
        self._started = False
        self._pending_since = self._pending_since or now
        finding = next(filter(None, map(why_pending, pods)), None)
        if finding is None and len(pods) < self._placement.nodes:
            finding = self._events(job)
        if finding is None:
            return False, None
        self._tell(finding.text)
        # A container that does not start holds its node; one without a machine holds nothing.
        hopeless = finding.kind in ("image", "start")
        self._problem_since = (self._problem_since or now) if hopeless else None
        late = now - self._pending_since > self._placement.pending_timeout_s
        if late or (self._problem_since is not None and now - self._problem_since >= self._patience.start_s):
            return True, Cause(finding=finding, over=False)
        return False, None

    def _pods(self, job: Mapping[str, Any]) -> list[Pod]:
        try:
            return list(self._client.pods(job, selector(self._name)))
        except CapabilityError as e:
            self._missing("pods", e)
            return []

    def _events(self, job: Mapping[str, Any]) -> Finding | None:
        fields = f"involvedObject.kind=Job,involvedObject.name={self._name}-{NODE}-0,type=Warning"
        try:
            return why_not_made(self._client.events(job, fields))
        except CapabilityError as e:
            self._missing("events", e)
            return None

    def _queue_message(self, job: Mapping[str, Any], said: str) -> str:
        if self._placement.queue is None:
            return f"job {self._name} is suspended: {said}"
        waiting = ""
        try:
            waiting = self._client.queue_message(job)
        except CapabilityError as e:
            self._missing("workloads", e)
        return f"job {self._name} waits in queue {self._placement.queue}: {waiting or said}"

    def _missing(self, what: str, error: NvilaError) -> None:
        """Tell once that something cannot be seen; the job itself can."""
        if what not in self._blind:
            self._blind.add(what)
            self._say(f"{error.message}; reasons of a job that waits or fails may be missing")

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._say(text)
