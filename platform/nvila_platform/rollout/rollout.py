"""A rollout, from what it finds in the cluster to the end: promoted, or taken back.

Every decision is written down before it is acted on, so whoever repeats the command goes on from there: after Ctrl-C, a
lost connection, an expired token or a machine that died.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from nvila.errors import CapabilityError, ConfigError, InfrastructureError, NvilaError
from nvila.evaluation.live_gate import LiveMeasured, is_enough, judge_live
from nvila.evaluation.policy import LiveLimits
from nvila_platform.cluster.inference_service import ENDPOINT_LABEL, Revision
from nvila_platform.cluster.resources import INFERENCE_SERVICES, SERVING_RUNTIMES, Resource, ResourceApi
from nvila_platform.rollout.live_metrics import LiveMetrics
from nvila_platform.rollout.readiness import Progress, stable_progress
from nvila_platform.rollout.state import RENEW_S, Plan, RolloutStore, State
from nvila_platform.rollout.traffic import StandardTraffic, traffic_of

logger = logging.getLogger(__name__)

PROMOTED, UNDONE, UNCHANGED = "promoted", "rolled back", "unchanged"
_LOOK_S = 10.0
_TRIES = 5

Notice = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a rollout ended.

    Args:
        state: One of `PROMOTED`, `UNDONE`, `UNCHANGED`.
        revision: What was to serve.
        reason: Why it was taken back; empty otherwise.
        verdicts: What was judged, step by step: `{"percent", "verdict"}`.
    """

    state: str
    revision: Revision
    reason: str = ""
    verdicts: list[dict[str, Any]] = field(default_factory=list)


class Rollout:
    """Carries out the plan of an endpoint.

    Args:
        api: The cluster.
        endpoint: Name of the endpoint.
        store: Its state, claimed.
        notice: Gets a line for people at every step.
        metrics: Measures live traffic; None where the plan judges nothing.
        named: Called once the target serves, to tell the registry.
        look_s: Seconds between two looks at the metrics.
    """

    def __init__(
        self,
        api: ResourceApi,
        endpoint: str,
        store: RolloutStore,
        notice: Notice,
        *,
        metrics: LiveMetrics | None = None,
        named: Callable[[Plan], None] = lambda plan: None,
        look_s: float = _LOOK_S,
    ) -> None:
        self._api, self._endpoint, self._store = api, endpoint, store
        self._notice, self._metrics, self._named = notice, metrics, named
        self._look_s = look_s
        self._verdicts: list[dict[str, Any]] = []
        self._renewed = time.monotonic()

    def run(self) -> Outcome:
        """Go on from where the state is until the target serves, or is taken back.

        Raises:
            ConfigError: Somebody else took over, or the cluster refuses a manifest.
            CapabilityError: This user may not do something, or the cluster cannot.
            InfrastructureError: The cluster cannot be reached; repeating the command goes on.
        """
        plan = self._plan
        if self._state.phase == "undoing":
            return self._undo(self._state.reason)
        if self._state.live is None:
            return self._first()
        if self._state.phase == "starting":
            refused = self._start()
            if refused:
                return self._undo(refused)
        if self._state.phase == "stepping":
            for step in range(self._state.step, len(plan.steps)):
                refused = self._step(step)
                if refused:
                    return self._undo(refused)
            self._store.change(phase="promoting")
        return self._finish()

    @property
    def _state(self) -> State:
        return self._store.state

    @property
    def _plan(self) -> Plan:
        assert self._state.plan is not None
        return self._state.plan

    def _first(self) -> Outcome:
        """Make an endpoint that was not there."""
        plan = self._plan
        if self._state.phase != "naming":
            self._store.change(phase="promoting")
        self._notice(f"making endpoint {self._endpoint} with {plan.target.name}")
        return self._finish()

    def _start(self) -> str:
        plan = self._plan
        traffic = traffic_of(self._api, self._endpoint, plan.target)
        self._notice(f"starting {plan.target.name} beside {_name(self._state.live)}, without traffic")
        try:
            if isinstance(traffic, StandardTraffic) and plan.steps:
                traffic.check()
            self._patiently(lambda: traffic.start(self._state))
        except (CapabilityError, ConfigError):
            # Nothing was changed yet, so nothing is under way.
            with contextlib.suppress(NvilaError):
                self._store.change(plan=None)
            raise
        waited = self._wait(lambda service: traffic.progress(service, self._state, 0))
        if waited:
            return f"{plan.target.name} did not get ready in {plan.timeout_s:.0f} s: {waited}"
        self._store.change(phase="stepping", step=0, since=0.0)
        return ""

    def _step(self, step: int) -> str:
        """Give the target its share and watch it; returns why it has to go, or nothing."""
        plan, percent = self._plan, self._plan.steps[step]
        traffic = traffic_of(self._api, self._endpoint, plan.target)
        if self._state.step != step or not self._state.since:
            self._notice(f"step {step + 1} of {len(plan.steps)}: {percent} % for {plan.target.name}")
            self._store.change(step=step, since=0.0)
            self._patiently(lambda: traffic.weigh(self._state, percent))
            waited = self._wait(lambda service: traffic.progress(service, self._state, percent))
            if waited:
                return f"{plan.target.name} did not get {percent} % in {plan.timeout_s:.0f} s: {waited}"
            self._store.change(since=self._api.now)
        else:
            self._notice(f"going on with step {step + 1} of {len(plan.steps)}: {percent} % for {plan.target.name}")
        return self._watch(traffic, percent)

    def _watch(self, traffic: Any, percent: int) -> str:
        """Watch a step until its time is over and enough was seen; a broken limit ends it at once."""
        plan = self._plan
        limits = LiveLimits.model_validate(plan.limits)
        while True:
            service = self._service()
            seconds = self._api.now - self._state.since
            lost = traffic.progress(service, self._state, percent)
            if not lost.ready:
                return f"{plan.target.name} stopped being ready at {percent} %: {lost.reason}"
            measured, trouble = self._measure(traffic.pods(service, self._state), seconds)
            verdict = judge_live(limits, measured)
            enough, late = is_enough(limits, measured), seconds >= plan.interval_s
            if (late and enough) or (enough and not verdict.passed) or seconds >= plan.interval_s + plan.timeout_s:
                said = verdict.to_dict()
                self._verdicts.append({"percent": percent, "seconds": round(seconds), **said})
                self._notice(f"{percent} %: {verdict.reason}")
                return "" if verdict.passed else f"at {percent} %: {trouble or verdict.reason}"
            self._rest(self._look_s)

    def _measure(self, pods: tuple[str, str], seconds: float) -> tuple[LiveMeasured, str]:
        assert self._metrics is not None, "a plan with steps has limits, and limits need metrics"
        try:
            return self._metrics.measure(pods, seconds), ""
        except InfrastructureError as e:
            logger.warning("%s", e)
            return LiveMeasured(requests=0), e.message

    def _finish(self) -> Outcome:
        """Make the target what serves, and tell the registry."""
        plan, state = self._plan, self._state
        if state.phase == "promoting":
            traffic = traffic_of(self._api, self._endpoint, plan.target)
            self._patiently(lambda: traffic.promote(self._state))
            waited = self._wait(stable_progress)
            if waited:
                self._not_ready(waited)
            self._store.change(phase="naming", live=plan.target, previous=state.live, labels=plan.labels)
        if plan.alias:
            self._named(plan)
        ended = self._end(PROMOTED, "")
        self._notice(f"{plan.target.name} serves endpoint {self._endpoint}")
        return ended

    def _not_ready(self, waited: str) -> None:
        """Raise for pods that did not come; of a first deployment nothing can be given back."""
        problem = f"{self._plan.target.name} did not get ready in {self._plan.timeout_s:.0f} s: {waited}"
        look = f"kubectl get pods -l {ENDPOINT_LABEL}={self._endpoint}"
        raise NvilaError(problem, f"mend the cause and repeat the command, which goes on; see {look}")

    def _undo(self, reason: str) -> Outcome:
        self._store.change(phase="undoing", reason=reason)
        self._notice(f"rolling back: {reason}")
        traffic = traffic_of(self._api, self._endpoint, self._plan.target)
        self._patiently(lambda: traffic.undo(self._state))
        return self._end(UNDONE, reason)

    def _end(self, how: str, reason: str) -> Outcome:
        plan = self._plan
        when = datetime.fromtimestamp(self._api.now, UTC).isoformat(timespec="seconds")
        outcome = {"state": how, "revision": plan.target.name, "reason": reason, "time": when}
        self._clean(keep=plan.target if how == UNDONE and plan.target.mode == "Knative" else None)
        self._store.change(plan=None, phase="starting", step=0, since=0.0, reason="", outcome=outcome)
        return Outcome(state=how, revision=plan.target, reason=reason, verdicts=self._verdicts)

    def _clean(self, keep: Revision | None) -> None:
        """Delete the runtimes that no revision needs which serves, served before, or is still in the manifest."""
        needed = {one.runtime for one in (self._state.live, self._state.previous, keep) if one is not None}
        for found in self._api.find(SERVING_RUNTIMES, f"{ENDPOINT_LABEL}={self._endpoint}"):
            if found["metadata"]["name"] not in needed:
                self._api.delete(SERVING_RUNTIMES, found["metadata"]["name"])

    def _wait(self, look: Callable[[Resource], Progress]) -> str:
        """Wait for something; returns what it still waits for when the time is over."""
        deadline = time.monotonic() + self._plan.timeout_s
        said = ""
        while (left := deadline - time.monotonic()) > 0:
            for service in self._changes(min(left, RENEW_S)):
                found = look(service) if service is not None else Progress(False, "the InferenceService is gone")
                if found.ready:
                    return ""
                if found.reason != said:
                    said = found.reason
                    self._notice(f"waiting: {said}")
            self._renew()
        return said or "its status says nothing"

    def _changes(self, seconds: float) -> Any:
        try:
            yield from self._api.watch(INFERENCE_SERVICES, self._endpoint, timeout_s=seconds)
        except InfrastructureError as e:
            logger.warning("%s", e)
            time.sleep(min(1.0, seconds))

    def _service(self) -> Resource:
        found: Resource | None = self._patiently(lambda: self._api.get(INFERENCE_SERVICES, self._endpoint))
        if found is None:
            raise ConfigError(f"endpoint '{self._endpoint}' was deleted", "deploy it again")
        return found

    def _rest(self, seconds: float) -> None:
        time.sleep(seconds)
        self._renew()

    def _renew(self) -> None:
        """Show that somebody is still at work."""
        if time.monotonic() - self._renewed >= RENEW_S:
            self._patiently(lambda: self._store.save(self._state))
            self._renewed = time.monotonic()

    @staticmethod
    def _patiently(work: Callable[[], Any]) -> Any:
        """Do something again that an outage of some seconds stopped."""
        for left in range(_TRIES, 0, -1):
            try:
                return work()
            except InfrastructureError as e:
                if left == 1:
                    raise
                logger.warning("%s; %d more tries", e.message, left - 1)
                time.sleep(2.0 ** (_TRIES - left) * 0.5)
        raise AssertionError("unreachable")


def begin(store: RolloutStore, plan: Plan) -> State:
    """Put a plan into the state of an endpoint, or find that the same one is under way.

    Raises:
        ConfigError: Another one is under way.
    """
    state = store.state
    # Of a first deployment that never got ready nothing serves, so another one may take its place.
    if state.plan is not None and (state.live is not None or state.plan.target.name == plan.target.name):
        if state.plan.target.name != plan.target.name:
            raise ConfigError(
                f"a rollout of {state.plan.target.model} stands at '{state.phase}'",
                f"finish it with nvila deploy {state.plan.target.model}, or undo it with nvila rollback",
            )
        return state
    return store.change(plan=plan, phase="starting", step=0, since=0.0, reason="")


def cancel(store: RolloutStore) -> State:
    """Turn the rollout under way into one that is undone.

    Raises:
        ConfigError: It is the first one, so there is nothing to go back to.
    """
    state = store.state
    if state.live is None:
        raise ConfigError("nothing served this endpoint before", "deploy the version that it shall serve")
    reason = state.reason or "it was stopped by nvila rollback"
    return store.change(phase="undoing", reason=reason)


def back(state: State, timeout_s: float, alias: str) -> Plan:
    """Return the plan that brings back what served before.

    Raises:
        ConfigError: Nothing did.
    """
    if state.previous is None:
        raise ConfigError("nothing served this endpoint before", "deploy the version that it shall serve")
    return Plan(target=replace(state.previous), timeout_s=timeout_s, alias=alias, labels=state.labels)


def _name(revision: Revision | None) -> str:
    return revision.name if revision is not None else "nothing"
