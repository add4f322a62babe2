"""How a share of an endpoint's traffic reaches a new revision: one way a mode of KServe.

Standard mode runs named canaries beside the stable predictor and splits by the weights of a route. Knative mode keeps
revisions itself and splits between the newest and the last one that got everything.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from nvila.errors import CapabilityError, ConfigError
from nvila_platform.cluster.inference_service import SCALING, Revision, inference_service
from nvila_platform.cluster.resources import INFERENCE_SERVICES, ROUTES, Resource, ResourceApi
from nvila_platform.rollout.readiness import (
    Progress,
    canary_progress,
    canary_status,
    knative_predictor,
    knative_progress,
    replicas,
    stable_progress,
)
from nvila_platform.rollout.state import Plan, State


class Traffic(Protocol):
    """What a rollout asks of a mode."""

    def start(self, state: State) -> None:
        """Make pods of the target, without traffic."""

    def weigh(self, state: State, percent: int) -> None:
        """Give the target a share."""

    def progress(self, service: Resource, state: State, percent: int) -> Progress:
        """Say whether the target has the share and can take it."""

    def promote(self, state: State) -> None:
        """Make the target the one that serves."""

    def undo(self, state: State) -> None:
        """Give all traffic back to what serves."""

    def pods(self, service: Resource, state: State) -> tuple[str, str]:
        """Return patterns of the names of the target's pods and of the others'."""


class StandardTraffic:
    """Named canaries of `spec.canary`.

    Args:
        api: The cluster.
        endpoint: Name of the endpoint.
    """

    def __init__(self, api: ResourceApi, endpoint: str) -> None:
        self._api, self._endpoint = api, endpoint

    def check(self) -> None:
        """Make sure that something splits the traffic.

        Raises:
            CapabilityError: KServe does not route by the Gateway API here, so weights would do nothing.
        """
        if self._route() is None:
            raise CapabilityError(
                f"endpoint '{self._endpoint}' has no HTTPRoute, so nothing splits its traffic by weight",
                "let KServe use the Gateway API (helm value kserve.controller.gateway.ingressGateway.enableGatewayApi)"
                ", or deploy without --policy: all traffic moves when the new pods are ready",
            )

    def start(self, state: State) -> None:
        """Make pods of the target, without traffic."""
        self.weigh(state, 0)

    def weigh(self, state: State, percent: int) -> None:
        """Give the target a share."""
        plan, live = _rolling(state)
        service = self._api.get(INFERENCE_SERVICES, self._endpoint) or {}
        # A canary is not scaled, so it gets its share of the pods that the load of now has made.
        wanted = max(self._running(service, plan.target.name), int(live.predictor["minReplicas"]))
        pods = max(1, math.ceil(min(wanted, int(live.predictor["maxReplicas"])) * percent / 100))
        canary = {"trafficPercent": percent, "predictor": canary_predictor(plan.target, pods)}
        try:
            self._apply(inference_service(self._endpoint, live, state.labels, canary=[canary]))
        except ConfigError as e:
            if 'unknown field "spec.canary"' not in e.message:
                raise
            raise CapabilityError(
                "this cluster's KServe has no spec.canary, which runs a new version beside the old one",
                "upgrade KServe to 0.20 or newer, or use --mode knative",
            ) from e

    def progress(self, service: Resource, state: State, percent: int) -> Progress:
        """Say whether the target has the share and can take it."""
        plan, _ = _rolling(state)
        found = canary_progress(service, plan.target.name)
        if not found.ready or not percent:
            return found
        weight = self._weight(f"{self._endpoint}-{plan.target.name}-predictor")
        if weight == percent:
            return found
        return Progress(False, f"the route gives canary {plan.target.name} {weight} % instead of {percent} %")

    def promote(self, state: State) -> None:
        """Make the target the one that serves; its pods stay as they are."""
        assert state.plan is not None
        self._apply(inference_service(self._endpoint, state.plan.target, state.plan.labels))

    def undo(self, state: State) -> None:
        """Give all traffic back to what serves."""
        _, live = _rolling(state)
        self._apply(inference_service(self._endpoint, live, state.labels))

    def pods(self, service: Resource, state: State) -> tuple[str, str]:
        """Return patterns of the names of the target's pods and of the others'."""
        plan, live = _rolling(state)
        return f"{self._endpoint}-{plan.target.name}-predictor-.+", f"{self._endpoint}-{live.name}-predictor-.+"

    def _apply(self, manifest: dict[str, Any]) -> None:
        self._api.apply(INFERENCE_SERVICES, manifest)

    @staticmethod
    def _running(service: Resource, canary: str) -> int:
        return replicas(service.get("status") or {}) + replicas(canary_status(service, canary))

    def _route(self) -> Resource | None:
        return self._api.get(ROUTES, self._endpoint)

    def _weight(self, backend: str) -> int:
        route = self._route() or {"spec": {"rules": []}}
        refs = [ref for rule in route["spec"]["rules"] for ref in rule.get("backendRefs", [])]
        return max((int(ref.get("weight", 1)) for ref in refs if ref["name"] == backend), default=0)


class KnativeTraffic:
    """Revisions of Knative, split by `canaryTrafficPercent`.

    Args:
        api: The cluster.
        endpoint: Name of the endpoint.
    """

    def __init__(self, api: ResourceApi, endpoint: str) -> None:
        self._api, self._endpoint = api, endpoint

    def start(self, state: State) -> None:
        """Make pods of the target, without traffic."""
        self.weigh(state, 0)

    def weigh(self, state: State, percent: int) -> None:
        """Give the target a share."""
        plan, _ = _rolling(state)
        self._apply(plan.target, plan.labels, percent)

    def progress(self, service: Resource, state: State, percent: int) -> Progress:
        """Say whether the newest revision is ready; Knative moves traffic by itself then."""
        return knative_progress(service)

    def promote(self, state: State) -> None:
        """Make the target the one that serves; its pods stay as they are."""
        assert state.plan is not None
        self._apply(state.plan.target, state.plan.labels, None)

    def undo(self, state: State) -> None:
        """Give all traffic back to what serves."""
        # Not the old predictor: that would be a third revision, and until it is ready the newest ready one, the bad
        # one, would get everything. With 0 % the last one that had all traffic keeps it.
        self.weigh(state, 0)

    def pods(self, service: Resource, state: State) -> tuple[str, str]:
        """Return patterns of the names of the target's pods and of the others'."""
        found = knative_predictor(service)
        new = str(found.get("latestCreatedRevision") or "none")
        old = found.get("latestRolledoutRevision")
        old = str((found.get("previousRolledoutRevision") if old == new else old) or "none")
        return f"{new}-deployment-.+", f"{old}-deployment-.+"

    def _apply(self, revision: Revision, labels: dict[str, str], percent: int | None) -> None:
        manifest = inference_service(self._endpoint, revision, labels)
        if percent is not None:
            manifest["spec"]["predictor"]["canaryTrafficPercent"] = percent
        self._api.apply(INFERENCE_SERVICES, manifest)


def canary_predictor(revision: Revision, pods: int) -> dict[str, Any]:
    """Return the predictor of a canary: it has a number of pods instead of a scaler."""
    own = {key: value for key, value in revision.predictor.items() if key not in SCALING}
    # KServe's definition wants a name of a canary's container and its webhook refuses one that is not empty.
    own["model"] = {"name": "", **own["model"]}
    return {"name": revision.name, "minReplicas": pods, **own}


def traffic_of(api: ResourceApi, endpoint: str, revision: Revision) -> StandardTraffic | KnativeTraffic:
    """Return how traffic reaches revisions in the mode of one."""
    return StandardTraffic(api, endpoint) if revision.mode == "Standard" else KnativeTraffic(api, endpoint)


def serves(service: Resource) -> Progress:
    """Say whether the whole service is ready."""
    return stable_progress(service)


def _rolling(state: State) -> tuple[Plan, Revision]:
    assert state.plan is not None
    assert state.live is not None
    return state.plan, state.live
