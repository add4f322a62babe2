"""What a status says, and what it does not say."""

from __future__ import annotations

from typing import Any

import pytest

from nvila_platform.rollout.readiness import canary_progress, knative_progress, stable_progress, why_not


def service(generation: int = 2, **status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "eye", "generation": generation}, "status": {"observedGeneration": 2} | status}


READY = [{"type": "Ready", "status": "True"}]


@pytest.mark.parametrize("look", [stable_progress, knative_progress, lambda one: canary_progress(one, "v2")])
def test_a_status_of_an_older_manifest_says_nothing(look: Any) -> None:
    fine: dict[str, Any] = {"conditions": READY, "canaryStatuses": [{"name": "v2", "ready": True}]}
    fine["components"] = {"predictor": {"latestCreatedRevision": "a", "latestReadyRevision": "a"}}
    assert look(service(**fine)).ready
    assert look(service(3, **fine)).reason == "KServe has not seen the change yet"
    assert not look({"metadata": {"name": "eye", "generation": 1}}).ready


def test_a_canary_is_told_from_the_others() -> None:
    found = service(conditions=READY, canaryStatuses=[{"name": "v1", "ready": True}, {"name": "v2", "ready": False}])
    assert canary_progress(found, "v1").ready
    assert canary_progress(found, "v2").reason == "canary v2: its pods are not ready"
    said = [{"type": "CanaryReady", "status": "False", "reason": "ImagePullBackOff", "message": "no such image"}]
    assert canary_progress(service(conditions=said), "v2").reason == "canary v2: ImagePullBackOff: no such image"


def test_a_revision_of_knative_has_to_be_the_newest() -> None:
    parts = {"predictor": {"latestCreatedRevision": "b", "latestReadyRevision": "a"}}
    assert knative_progress(service(conditions=READY, components=parts)).reason.startswith("revision b: ")


def test_reasons_are_given_once_and_the_most_telling_first() -> None:
    failure = {"lastFailureInfo": {"reason": "ModelLoadFailed", "message": "damaged", "exitCode": 1}}
    conditions = [
        {"type": "Ready", "status": "False", "reason": "NotReady"},
        {"type": "PredictorReady", "status": "False", "reason": "NotReady"},
        {"type": "IngressReady", "status": "True", "reason": "Fine"},
    ]
    said = why_not(service(conditions=conditions, modelStatus=failure))
    assert said == "ModelLoadFailed: damaged (exit code 1); NotReady"
    assert why_not({}) == "its pods are not ready"
