"""Deploying and going back: the registry on one side, the cluster on the other."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.errors import ConfigError, NvilaError
from nvila_pipelines.deployment.preflight import check_cluster_for
from nvila_pipelines.deployment.request import (
    DEFAULT_STEPS,
    DeployRequest,
    Registered,
    check_rollout,
    find_version,
    serving_values,
)
from nvila_platform.artifacts import storage_errors, utc_now, write_atomically

if TYPE_CHECKING:
    from nvila_platform.cluster.inference_service import Revision
    from nvila_platform.cluster.resources import Resource, ResourceApi
    from nvila_platform.rollout.rollout import Notice, Outcome
    from nvila_platform.rollout.state import Plan, RolloutStore, State
    from nvila_platform.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifests:
    """What a deployment makes in the end.

    Args:
        endpoint: Name of the endpoint.
        revision: What shall serve.
        labels: Labels of its resources.
        runtime: The ServingRuntime.
        service: The InferenceService once the revision serves.
        warnings: What whoever deploys should know.
    """

    endpoint: str
    revision: Revision
    labels: dict[str, str]
    runtime: Resource
    service: Resource
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """How a deployment ended.

    Args:
        endpoint: Name of the endpoint.
        namespace: Where it is.
        outcome: How the rollout ended.
        url: Where it answers.
        file: The verdict's file; None where nothing was judged.
        warnings: What whoever deployed it should know.
    """

    endpoint: str
    namespace: str
    outcome: Outcome
    url: str
    file: Path | None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        revision = self.outcome.revision
        return {
            "endpoint": self.endpoint,
            "namespace": self.namespace,
            "state": self.outcome.state,
            "reason": self.outcome.reason,
            "revision": revision.name,
            "model": revision.model,
            "version": revision.version,
            "digest": revision.digest,
            "url": self.url,
            "verdicts": self.outcome.verdicts,
            "file": str(self.file) if self.file is not None else "",
            "warnings": list(self.warnings),
        }


def render(request: DeployRequest, settings: Settings, namespace: str) -> Manifests:
    """Return what a deployment would make.

    Raises:
        ConfigError: The model, a value or a name is wrong.
        GateError: The gate refused the model.
        InfrastructureError: The registry failed.
    """
    from nvila_platform.cluster.inference_service import build, check_name, inference_service, labels

    found: Registered = find_version(settings, request.model)
    values, unused = serving_values(request, found.version)
    endpoint = check_name(request.endpoint or re.sub(r"[^a-z0-9-]+", "-", found.version.name.lower()).strip("-"))
    revision, runtime = build(endpoint, namespace, values, request.mode, found.version.model_uri)
    common = labels(endpoint, values)
    warnings = [*found.warnings]
    if unused:
        warnings.append(f"{', '.join(unused)} of the values: only the chart makes these, they stay as they are")
    service = inference_service(endpoint, revision, common)
    for manifest in (runtime, service):
        manifest["metadata"]["namespace"] = namespace
    return Manifests(
        endpoint=endpoint,
        revision=revision,
        labels=common,
        runtime=runtime,
        service=service,
        warnings=tuple(warnings),
    )


def deploy(request: DeployRequest, settings: Settings, notice: Notice) -> Deployed:
    """Roll a registered version out, or go on where a rollout of it stopped.

    Args:
        request: What to deploy and how.
        settings: Where the registry is.
        notice: Gets a line for people at every step.

    Raises:
        ConfigError: Something in the request is wrong, or somebody else works on the endpoint.
        CapabilityError: The cluster lacks something, or this user may not do it.
        GateError: The gate refused the version before.
        InfrastructureError: A service cannot be reached; repeating the command goes on.
    """
    from nvila_platform.cluster.resources import SERVING_RUNTIMES, ResourceApi
    from nvila_platform.rollout.rollout import UNCHANGED, Outcome, begin
    from nvila_platform.rollout.state import RolloutStore

    check_rollout(request)
    with _api(ResourceApi, request.namespace) as api:
        made = render(request, settings, api.namespace)
        for warning in made.warnings:
            logger.warning("%s", warning)
        check_cluster_for(api, made.revision, splits=request.policy is not None)
        service = _own_service(api, made)
        store = RolloutStore(api, made.endpoint)
        with _claimed(store):
            _check_state(store, service, made)
            if store.state.plan is None and _serves(store.state, made.revision):
                _name_version(settings, made.revision, request.alias)
                outcome = Outcome(state=UNCHANGED, revision=made.revision)
            else:
                begin(store, _plan(request, made))
                api.apply(SERVING_RUNTIMES, made.runtime)
                outcome = _carry_out(api, made.endpoint, store, settings, notice)
        return _deployed(api, made, outcome, settings)


def go_back(
    endpoint: str, namespace: str, timeout_s: float, alias: str, settings: Settings, notice: Notice
) -> Deployed:
    """Undo the rollout under way, or bring back what served before.

    Raises:
        ConfigError: Nothing did, or there is no such endpoint.
        CapabilityError: The cluster lacks something, or this user may not do it.
        InfrastructureError: A service cannot be reached; repeating the command goes on.
    """
    from nvila_platform.cluster.resources import INFERENCE_SERVICES, LEASES, ResourceApi
    from nvila_platform.rollout.rollout import back, begin, cancel
    from nvila_platform.rollout.state import RolloutStore, lease_name

    with _api(ResourceApi, namespace) as api:
        if api.get(INFERENCE_SERVICES, endpoint) is None or api.get(LEASES, lease_name(endpoint)) is None:
            raise ConfigError(
                f"namespace '{api.namespace}' has no endpoint '{endpoint}' that nvila deployed", "see nvila status"
            )
        store = RolloutStore(api, endpoint)
        with _claimed(store, take_over=True):
            if store.state.phase == "naming":
                # It serves already, only the registry does not know.
                store.change(plan=None, phase="starting")
            plan = store.state.plan
            # A going back that stopped half-way is gone on with.
            if plan is None:
                begin(store, back(store.state, timeout_s, alias))
            elif plan.steps or store.state.previous != plan.target:
                cancel(store)
            outcome = _carry_out(api, endpoint, store, settings, notice)
        found = api.get(INFERENCE_SERVICES, endpoint) or {}
        url = str((found.get("status") or {}).get("url", ""))
        return Deployed(endpoint=endpoint, namespace=api.namespace, outcome=outcome, url=url, file=None)


def _carry_out(api: ResourceApi, endpoint: str, store: RolloutStore, settings: Settings, notice: Notice) -> Outcome:
    from nvila_platform.prometheus import Prometheus
    from nvila_platform.rollout.live_metrics import LiveMetrics
    from nvila_platform.rollout.rollout import Rollout

    plan = store.state.plan
    assert plan is not None
    metrics = None
    if plan.steps:
        metrics = LiveMetrics(Prometheus(plan.prometheus, settings.prometheus_token), api.namespace, endpoint)
    rollout = Rollout(
        api,
        endpoint,
        store,
        notice,
        metrics=metrics,
        named=lambda done: _name_version(settings, done.target, done.alias),
        look_s=min(10.0, max(0.1, plan.interval_s / 4)),
    )
    return rollout.run()


def _plan(request: DeployRequest, made: Manifests) -> Plan:
    from nvila_platform.rollout.state import Plan

    limits = None
    if request.policy is not None and request.policy.live is not None:
        limits = request.policy.live.model_dump()
    return Plan(
        target=made.revision,
        steps=tuple(request.steps or DEFAULT_STEPS) if limits is not None else (),
        interval_s=request.interval_s,
        timeout_s=request.timeout_s,
        limits=limits,
        prometheus=request.prometheus,
        alias=request.alias,
        labels=made.labels,
    )


def _own_service(api: ResourceApi, made: Manifests) -> Resource | None:
    """Return the InferenceService of this name; one that somebody else made is not touched."""
    from nvila_platform.cluster.inference_service import ENDPOINT_LABEL
    from nvila_platform.cluster.resources import INFERENCE_SERVICES

    service = api.get(INFERENCE_SERVICES, made.endpoint)
    if service is None:
        return None
    marks = service["metadata"].get("labels") or {}
    if marks.get(ENDPOINT_LABEL) != made.endpoint:
        owner = marks.get("app.kubernetes.io/managed-by", "somebody else")
        raise ConfigError(
            f"InferenceService '{made.endpoint}' in namespace '{api.namespace}' is managed by {owner}",
            "choose another name with --name",
        )
    return service


def _check_state(store: RolloutStore, service: Resource | None, made: Manifests) -> None:
    from dataclasses import replace

    state = store.state
    if service is None and state.live is not None:
        # Deleted by hand: nothing serves, and what served before can be deployed again.
        store.save(replace(state, live=None, plan=None, phase="starting", step=0, since=0.0))
    elif service is not None and state.live is None and state.plan is None:
        raise ConfigError(
            f"the state of endpoint '{made.endpoint}' is gone, so nothing says what serves it",
            f"delete it (kubectl delete inferenceservice {made.endpoint}) and deploy again, or use another --name",
        )
    elif state.live is not None and state.live.mode != made.revision.mode:
        raise ConfigError(
            f"endpoint '{made.endpoint}' runs in mode {state.live.mode}, which KServe does not change",
            f"use --mode {state.live.mode.lower()}, or another --name",
        )


def _serves(state: State, revision: Revision) -> bool:
    return state.live is not None and state.live.name == revision.name


def _name_version(settings: Settings, revision: Revision, alias: str) -> None:
    """Move the alias to what serves."""
    from nvila_platform.registry import resolve, set_alias

    if alias:
        version = resolve(settings, revision.model)
        set_alias(settings, version.name, alias, version.version)


def _deployed(api: ResourceApi, made: Manifests, outcome: Outcome, settings: Settings) -> Deployed:
    from nvila_platform.cluster.resources import INFERENCE_SERVICES

    service = api.get(INFERENCE_SERVICES, made.endpoint) or {}
    done = Deployed(
        endpoint=made.endpoint,
        namespace=api.namespace,
        outcome=outcome,
        url=str((service.get("status") or {}).get("url", "")),
        file=_verdict_file(made.endpoint, settings) if outcome.verdicts else None,
        warnings=made.warnings,
    )
    if done.file is not None:
        last = outcome.verdicts[-1]
        said = {key: last[key] for key in ("passed", "reason", "checks")}
        with storage_errors(done.file):
            done.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(done.file, json.dumps(said | done.to_dict() | {"time": utc_now()}, indent=2) + "\n")
    return done


def _verdict_file(endpoint: str, settings: Settings) -> Path:
    stamp = re.sub(r"[^0-9TZ]", "", utc_now())
    return settings.workspace / "deployments" / endpoint / f"{stamp}_verdict.json"


@contextlib.contextmanager
def _api(kind: type[ResourceApi], namespace: str) -> Iterator[ResourceApi]:
    api = kind(namespace)
    try:
        yield api
    finally:
        api.close()


@contextlib.contextmanager
def _claimed(store: RolloutStore, *, take_over: bool = False) -> Iterator[None]:
    """Work on an endpoint alone; whoever comes next need not wait, however this ended."""
    store.claim(take_over=take_over)
    try:
        yield
    finally:
        with contextlib.suppress(NvilaError):
            store.release()
