"""What serves: one row a revision of every endpoint, from the InferenceServices and the Leases beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nvila.errors import ConfigError
from nvila_platform.cluster.inference_service import DIGEST, ENDPOINT_LABEL, MODEL, VERSION
from nvila_platform.cluster.resources import INFERENCE_SERVICES, LEASES, Resource
from nvila_platform.rollout.readiness import (
    canary_status,
    is_ready,
    knative_predictor,
    replicas,
    why_not,
)
from nvila_platform.rollout.state import State, lease_name, read_state

if TYPE_CHECKING:
    from nvila_platform.cluster.resources import ResourceApi

HEAD = ("endpoint", "revision", "traffic", "replicas", "ready", "model", "digest", "url", "")
_SHORT = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One revision of an endpoint.

    Args:
        endpoint: Name of the endpoint.
        revision: Name of the revision.
        traffic: Its share in percent.
        replicas: Its pods, as KServe counts them.
        ready: Whether it can answer.
        reason: Why not, or what the rollout is at.
        url: Where the endpoint answers.
        model: Address of the version.
        version: Its number.
        digest: Digest of its files.
    """

    endpoint: str
    revision: str
    traffic: int
    replicas: int
    ready: bool
    reason: str
    url: str
    model: str
    version: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointStatus:
    """An endpoint.

    Args:
        rows: Its revisions.
        rollout: `phase`, `step`, `steps` and `target` of the rollout under way; empty without one.
        outcome: How the last rollout ended.
        holder: Who works on it.
    """

    rows: tuple[Row, ...]
    rollout: dict[str, Any]
    outcome: dict[str, Any]
    holder: str

    @property
    def rests(self) -> bool:
        """Whether everything is ready and no rollout is under way."""
        return not self.rollout and all(row.ready for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self) | {"rests": self.rests}


def read_status(api: ResourceApi, endpoint: str = "") -> list[EndpointStatus]:
    """Look at one endpoint, or all of the namespace.

    Raises:
        ConfigError: There is none of this name.
        CapabilityError: The cluster has no KServe, or this user may not look.
        InfrastructureError: It cannot be reached.
    """
    if endpoint:
        found = api.get(INFERENCE_SERVICES, endpoint)
        if found is None:
            known = [one["metadata"]["name"] for one in api.find(INFERENCE_SERVICES, ENDPOINT_LABEL)]
            hint = f"known: {', '.join(known)}" if known else "nothing is deployed there: nvila deploy MODEL"
            raise ConfigError(f"namespace '{api.namespace}' has no endpoint '{endpoint}'", hint)
        services = [found]
    else:
        services = api.find(INFERENCE_SERVICES, ENDPOINT_LABEL)
    return [endpoint_status(one, api.get(LEASES, lease_name(one["metadata"]["name"]))) for one in services]


def endpoint_status(service: Resource, lease: Resource | None) -> EndpointStatus:
    """Return what an InferenceService and its Lease say."""
    state = read_state(lease)
    knative = service["metadata"].get("annotations", {}).get("serving.kserve.io/deploymentMode") == "Knative"
    rollout = {}
    if state.plan is not None:
        rollout = {
            "phase": state.phase,
            "target": state.plan.target.name,
            "model": state.plan.target.model,
            "step": state.step,
            "steps": list(state.plan.steps),
        }
    return EndpointStatus(
        rows=tuple(_knative(service, state) if knative else _standard(service, state)),
        rollout=rollout,
        outcome=state.outcome,
        holder=str(((lease or {}).get("spec") or {}).get("holderIdentity") or ""),
    )


def status_lines(found: Sequence[EndpointStatus]) -> list[str]:
    """Return a table, and under it what every rollout is at."""
    from nvila_pipelines.evaluation.table import aligned

    rows: list[tuple[str, ...]] = [HEAD]
    notes = []
    for one in found:
        for row in one.rows:
            ready = "yes" if row.ready else "no"
            cells = (row.endpoint, row.revision, f"{row.traffic} %", str(row.replicas), ready, row.model)
            rows.append((*cells, row.digest[:_SHORT], row.url, row.reason))
        if one.rollout:
            notes.append(_note(one))
        elif one.outcome:
            reason = f": {one.outcome['reason']}" if one.outcome.get("reason") else ""
            notes.append(f"{one.rows[0].endpoint}: {one.outcome['revision']} was {one.outcome['state']}{reason}")
    return [line.rstrip() for line in aligned(rows)] + ([""] if notes else []) + notes


def _note(one: EndpointStatus) -> str:
    rollout = one.rollout
    at = (
        f"step {rollout['step'] + 1} of {len(rollout['steps'])}" if rollout["phase"] == "stepping" else rollout["phase"]
    )
    who = one.holder or "nobody; the same nvila deploy goes on"
    return f"{one.rows[0].endpoint}: rollout of {rollout['target']} at {at}, by {who}"


def _standard(service: Resource, state: State) -> Iterator[Row]:
    canaries = service["spec"].get("canary") or []
    status = service.get("status") or {}
    taken = 0
    rows = []
    for canary in canaries:
        name = canary["predictor"]["name"]
        found = canary_status(service, name)
        taken += int(canary["trafficPercent"])
        ready = bool(found.get("ready"))
        reason = "" if ready else why_not({"status": {"modelStatus": found.get("modelStatus")}})
        rows.append(_row(service, canary["predictor"], name, canary["trafficPercent"], replicas(found), ready, reason))
    predictor = service["spec"]["predictor"]
    ready = is_ready(service)
    name = str(predictor.get("name") or (state.live.name if state.live is not None else "-"))
    reason = "" if ready else why_not(service)
    yield _row(service, predictor, name, 100 - taken, replicas(status), ready, reason)
    yield from rows


def _knative(service: Resource, state: State) -> Iterator[Row]:
    predictor, ready = service["spec"]["predictor"], is_ready(service)
    found = knative_predictor(service)
    new = str(found.get("latestCreatedRevision") or "-")
    shares = {str(one.get("revisionName")): int(one.get("percent") or 0) for one in found.get("traffic") or []}
    reason = "" if ready else why_not(service)
    count = replicas(service.get("status") or {})
    marks = (
        {} if state.live is None else {MODEL: state.live.model, VERSION: state.live.version, DIGEST: state.live.digest}
    )
    for name, share in shares.items():
        if name != new:
            yield _row(service, {"annotations": marks}, name, share, 0, True, "")
    yield _row(service, predictor, new, shares.get(new, 0 if shares else 100), count, ready, reason)


def _row(
    service: Resource,
    predictor: Mapping[str, Any],
    name: str,
    traffic: int,
    count: int,
    ready: bool,
    reason: str,
) -> Row:
    marks = predictor.get("annotations") or {}
    return Row(
        endpoint=service["metadata"]["name"],
        revision=name,
        traffic=int(traffic),
        replicas=count,
        ready=ready,
        reason=reason,
        url=str((service.get("status") or {}).get("url", "")),
        model=str(marks.get(MODEL, "-")),
        version=str(marks.get(VERSION, "")),
        digest=str(marks.get(DIGEST, "")),
    )
