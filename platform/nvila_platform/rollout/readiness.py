"""What an InferenceService's status says: whether a revision can take traffic, and if not, why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Resource = Mapping[str, Any]
_REASON_LETTERS = 400


@dataclass(frozen=True, slots=True)
class Progress:
    """Whether something is ready, or what it still waits for."""

    ready: bool
    reason: str = ""


def stable_progress(service: Resource) -> Progress:
    """Look at the whole service."""
    if not _observed(service):
        return Progress(False, "KServe has not seen the change yet")
    ready = _condition(service, "Ready")
    return Progress(True) if ready.get("status") == "True" else Progress(False, why_not(service))


def canary_progress(service: Resource, name: str) -> Progress:
    """Look at one canary of Standard mode."""
    if not _observed(service):
        return Progress(False, "KServe has not seen the change yet")
    status = canary_status(service, name)
    if status.get("ready"):
        return Progress(True)
    failure = _failure(status.get("modelStatus") or {})
    aggregate = next((one for one in _conditions(service) if str(one.get("type", "")).startswith("Canary")), {})
    said = failure or _said(aggregate) or "its pods are not ready"
    return Progress(False, f"canary {name}: {said}"[:_REASON_LETTERS])


def knative_progress(service: Resource) -> Progress:
    """Look at the newest revision of Knative mode."""
    if not _observed(service):
        return Progress(False, "KServe has not seen the change yet")
    predictor = knative_predictor(service)
    created, ready = predictor.get("latestCreatedRevision"), predictor.get("latestReadyRevision")
    if created and created == ready:
        return Progress(True)
    return Progress(False, f"revision {created or 'none'}: {why_not(service)}"[:_REASON_LETTERS])


def canary_status(service: Resource, name: str) -> dict[str, Any]:
    """Return what the status says about a canary; empty before it says anything."""
    found = (service.get("status") or {}).get("canaryStatuses") or []
    return next((dict(one) for one in found if one.get("name") == name), {})


def knative_predictor(service: Resource) -> dict[str, Any]:
    """Return what the status says about the predictor's revisions."""
    return dict(((service.get("status") or {}).get("components") or {}).get("predictor") or {})


def replicas(status: Resource) -> int:
    """Return the number of pods that a status or the status of a canary counts."""
    copies = (status.get("modelStatus") or {}).get("copies") or {}
    return int(copies.get("totalCopies") or 0)


def why_not(service: Resource) -> str:
    """Return the reasons that the status gives, the most telling first."""
    status = service.get("status") or {}
    said = [_failure(status.get("modelStatus") or {})]
    said += [_said(one) for one in _conditions(service) if one.get("status") == "False"]
    reasons = list(dict.fromkeys(filter(None, said)))
    return "; ".join(reasons)[:_REASON_LETTERS] or "its pods are not ready"


def is_ready(service: Resource) -> bool:
    """Whether KServe calls the service ready."""
    return bool(_condition(service, "Ready").get("status") == "True")


def _failure(model_status: Resource) -> str:
    found = model_status.get("lastFailureInfo") or {}
    words = [str(found[key]) for key in ("reason", "message") if found.get(key)]
    return ": ".join(words) + (f" (exit code {found['exitCode']})" if found.get("exitCode") else "")


def _said(condition: Resource) -> str:
    words = [str(condition[key]) for key in ("reason", "message") if condition.get(key)]
    return ": ".join(words)


def _observed(service: Resource) -> bool:
    seen = (service.get("status") or {}).get("observedGeneration")
    return seen is not None and int(seen) >= int(service["metadata"].get("generation", 0))


def _conditions(service: Resource) -> Iterator[Resource]:
    yield from (service.get("status") or {}).get("conditions") or []


def _condition(service: Resource, kind: str) -> Resource:
    return next((one for one in _conditions(service) if one.get("type") == kind), {})
