"""What the pods of a job say about why it waits or has failed: pure functions of what the API server returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Pod = Mapping[str, Any]
Kind = Literal["memory", "lost", "exit", "image", "start", "unschedulable", "quota"]

_INDEX = "batch.kubernetes.io/job-completion-index"
_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_START_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
# Reasons of a pod that Kubernetes ended, whatever its containers did.
_LOST_REASONS = (
    "NodeLost",
    "Evicted",
    "Preempting",
    "Shutdown",
    "NodeShutdown",
    "Terminated",
    "UnexpectedAdmissionError",
)
# What is told first when several pods ended between two looks: the cause rather than what followed from it.
_ORDER: tuple[Kind, ...] = ("memory", "lost", "exit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Why a pod ended or does not start.

    Args:
        kind: What sort of reason.
        text: For people, with the node.
        code: Exit code of the container, where it ended by itself.
    """

    kind: Kind
    text: str
    code: int = 0


def selector(job: str) -> str:
    """Return the labels of a job's pods."""
    return f"jobset.sigs.k8s.io/jobset-name={job}"


def name_of(pod: Pod) -> str:
    """Return a pod's name."""
    return str(pod["metadata"]["name"])


def place_of(pod: Pod) -> str:
    """Say which node of the job a pod is, and on which machine."""
    index = pod["metadata"].get("labels", {}).get(_INDEX, "?")
    machine = pod.get("spec", {}).get("nodeName")
    return f"node {index} (on {machine})" if machine else f"node {index}"


def has_started(pod: Pod) -> bool:
    """Whether there may be a log."""
    return any("running" in one["state"] or "terminated" in one["state"] for one in _containers(pod))


def has_ended(pod: Pod) -> bool:
    """Whether no more lines come."""
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def why_ended(pod: Pod) -> Finding | None:
    """Return why a pod has ended badly, or None while it has not."""
    status, place = pod.get("status", {}), place_of(pod)
    ended = [one["state"].get("terminated") or one.get("lastState", {}).get("terminated") for one in _containers(pod)]
    for state in filter(None, ended):
        if state.get("reason") == "OOMKilled":
            return Finding(kind="memory", text=f"{place} ran out of memory", code=int(state.get("exitCode", 137)))
    for one in status.get("conditions", []):
        if one["type"] == "DisruptionTarget" and one["status"] == "True":
            return Finding(kind="lost", text=f"{place} was lost: {_told(one)}")
    if status.get("reason") in _LOST_REASONS:
        return Finding(kind="lost", text=f"{place} was lost: {_told(status)}")
    for state in filter(None, ended):
        if code := int(state.get("exitCode", 0)):
            return Finding(kind="exit", text=f"{place} ended with exit code {code}", code=code)
    return None


def why_pending(pod: Pod) -> Finding | None:
    """Return why a pod does not start, or None when nothing keeps it."""
    place = place_of(pod)
    status = pod.get("status", {})
    for one in [*status.get("initContainerStatuses", []), *_containers(pod)]:
        waiting = one["state"].get("waiting", {})
        reason = waiting.get("reason", "")
        if reason in _IMAGE_REASONS:
            text = f"{place} cannot pull the image {one.get('image', '')}: {_told(waiting)}"
            return Finding(kind="image", text=text)
        if reason in _START_REASONS:
            return Finding(kind="start", text=f"{place} cannot start its container: {_told(waiting)}")
    for one in status.get("conditions", []):
        if one["type"] == "PodScheduled" and one["status"] == "False" and one.get("reason") == "Unschedulable":
            return Finding(kind="unschedulable", text=f"{place} finds no machine: {one.get('message', '')}")
    return None


def why_not_made(events: Iterable[Mapping[str, Any]]) -> Finding | None:
    """Return why pods were not even made, from the warnings about their job."""
    said = [str(one.get("message", "")) for one in events if one.get("reason") == "FailedCreate"]
    if not said:
        return None
    kind: Kind = "quota" if "quota" in said[-1] else "start"
    return Finding(kind=kind, text=f"the cluster makes no pods: {said[-1]}")


class PodHistory:
    """Remembers what happened to pods first; a failed job has often lost the pods that would tell."""

    def __init__(self) -> None:
        self.cause: Finding | None = None
        self._known: dict[str, Pod] = {}

    def look(self, pods: Sequence[Pod]) -> None:
        """Take what the cluster says now.

        Pods that take the place of others mean that the cluster has started these again, so that how they ended does
        not count any more.
        """
        now = {name_of(pod): pod for pod in pods}
        gone = [pod for name, pod in self._known.items() if name not in now]
        if gone and any(name not in self._known for name in now):
            self.cause, gone = None, []
        if self.cause is None:
            found = [finding for pod in pods if (finding := why_ended(pod))]
            # Nodes that the controllers take away after a failure are gone, too: that tells least.
            found = found or [_gone(pod) for pod in gone if not has_ended(pod)]
            self.cause = min(found, key=lambda one: _ORDER.index(one.kind), default=None)
        self._known = now


def _gone(pod: Pod) -> Finding:
    return Finding(kind="lost", text=f"{place_of(pod)} is gone with its pod")


def _containers(pod: Pod) -> list[Mapping[str, Any]]:
    return list(pod.get("status", {}).get("containerStatuses", []))


def _told(state: Mapping[str, Any]) -> str:
    return ": ".join(filter(None, (str(state.get("reason", "")), str(state.get("message", ""))))) or "no reason given"
