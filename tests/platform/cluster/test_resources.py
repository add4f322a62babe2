"""Resources over real HTTP: applying, watching, and what goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from nvila.errors import CapabilityError, ConfigError, InfrastructureError, NvilaError
from nvila_platform.cluster.errors import ConflictError
from nvila_platform.cluster.resources import (
    INFERENCE_SERVICES,
    LEASES,
    ROUTES,
    SERVING_RUNTIMES,
    ResourceApi,
)

if TYPE_CHECKING:
    from tests.api_server import Cluster

KEY = ("serving.kserve.io", "inferenceservices", "eye")


@pytest.fixture
def cluster(api_server: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    made: Cluster = api_server.Cluster()
    with api_server.serving(made) as address:
        config = tmp_path / "kubeconfig"
        config.write_text(yaml.safe_dump(api_server.kubeconfig(address)))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(config))
        yield made


@pytest.fixture
def api(cluster: Cluster) -> Iterator[ResourceApi]:
    made = ResourceApi()
    yield made
    made.close()


def service(**spec: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": "eye", "labels": {"nvila.dev/endpoint": "eye"}}
    return {"apiVersion": INFERENCE_SERVICES.api, "kind": "InferenceService", "metadata": metadata, "spec": spec}


def test_what_is_applied_is_read_listed_and_deleted(api: ResourceApi) -> None:
    assert api.namespace == "models"
    assert api.get(INFERENCE_SERVICES, "eye") is None
    made = api.apply(INFERENCE_SERVICES, service(predictor={"a": 1}))
    assert made["metadata"]["namespace"] == "models"
    assert api.get(INFERENCE_SERVICES, "eye") == made
    assert [one["metadata"]["name"] for one in api.find(INFERENCE_SERVICES, "nvila.dev/endpoint=eye")] == ["eye"]
    assert api.find(INFERENCE_SERVICES, "nvila.dev/endpoint=ear") == []
    api.delete(INFERENCE_SERVICES, "eye")
    api.delete(INFERENCE_SERVICES, "eye")
    assert api.find(INFERENCE_SERVICES) == []


def test_what_is_no_longer_applied_is_taken_away(api: ResourceApi) -> None:
    api.apply(INFERENCE_SERVICES, service(predictor={"a": 1}, canary=[{"b": 2}]))
    assert api.apply(INFERENCE_SERVICES, service(predictor={"a": 1}))["spec"] == {"predictor": {"a": 1}}


def test_an_older_version_does_not_win(api: ResourceApi) -> None:
    old = api.apply(INFERENCE_SERVICES, service(predictor={"a": 1}))["metadata"]["resourceVersion"]
    api.apply(INFERENCE_SERVICES, service(predictor={"a": 2}))
    late = service(predictor={"a": 3})
    late["metadata"]["resourceVersion"] = old
    with pytest.raises(ConflictError, match="has been modified"):
        api.apply(INFERENCE_SERVICES, late)
    found = api.get(INFERENCE_SERVICES, "eye")
    assert found is not None
    assert found["spec"]["predictor"] == {"a": 2}


def test_a_name_is_made_once(api: ResourceApi) -> None:
    lease = {"apiVersion": LEASES.api, "kind": "Lease", "metadata": {"name": "x"}, "spec": {}}
    assert [api.create(LEASES, lease), api.create(LEASES, lease)] == [True, False]


def test_the_clock_is_that_of_the_server(api: ResourceApi, cluster: Cluster) -> None:
    api.get(INFERENCE_SERVICES, "eye")
    assert abs(api.now - time.time()) < 5
    cluster.ahead_s = 3600
    api.get(INFERENCE_SERVICES, "eye")
    assert abs(api.now - time.time() - 3600) < 5


def test_groups_are_listed(api: ResourceApi) -> None:
    assert api.groups().keys() == {"serving.kserve.io", "gateway.networking.k8s.io"}


CALLS: dict[str, Callable[[ResourceApi], object]] = {
    "get": lambda api: api.get(INFERENCE_SERVICES, "eye"),
    "list": lambda api: api.find(INFERENCE_SERVICES),
    "patch": lambda api: api.apply(INFERENCE_SERVICES, service(predictor={})),
    "create": lambda api: api.create(INFERENCE_SERVICES, service(predictor={})),
    "delete": lambda api: api.delete(INFERENCE_SERVICES, "eye"),
    "watch": lambda api: list(api.watch(INFERENCE_SERVICES, "eye", timeout_s=1)),
}


@pytest.mark.parametrize("verb", CALLS)
def test_a_right_that_is_missing_is_named(api: ResourceApi, cluster: Cluster, verb: str) -> None:
    cluster.denied.add((verb, "inferenceservices"))
    with pytest.raises(CapabilityError, match=f'cannot {verb} resource "inferenceservices"') as failed:
        CALLS[verb](api)
    assert f"may not {verb} " in failed.value.message
    assert "in namespace 'models'" in failed.value.message


@pytest.mark.parametrize("verb", ["list", "patch", "create"])
def test_a_kind_that_the_cluster_lacks_is_named(api: ResourceApi, cluster: Cluster, verb: str) -> None:
    cluster.groups.clear()
    with pytest.raises(CapabilityError, match=r"the cluster has no inferenceservices\.serving\.kserve\.io"):
        CALLS[verb](api)


@pytest.mark.parametrize("verb", CALLS)
def test_a_token_that_expired_is_told(api: ResourceApi, cluster: Cluster, verb: str) -> None:
    cluster.expired = True
    with pytest.raises(CapabilityError, match="no longer takes this user's token") as failed:
        CALLS[verb](api)
    assert "log in again" in failed.value.hint


@pytest.mark.parametrize(
    ("status", "error"),
    [(500, InfrastructureError), (429, InfrastructureError), (422, ConfigError), (400, ConfigError)],
)
def test_what_the_server_says_is_typed(
    api: ResourceApi, cluster: Cluster, status: int, error: type[NvilaError]
) -> None:
    cluster.failing = [status]
    with pytest.raises(error, match="etcd is away"):
        api.get(INFERENCE_SERVICES, "eye")


def test_a_server_that_is_gone_is_worth_another_try(api: ResourceApi, tmp_path: Path) -> None:
    config = yaml.safe_load((tmp_path / "kubeconfig").read_text())
    config["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:1"
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    away = ResourceApi()
    with pytest.raises(InfrastructureError, match=r"cannot be reached \(get InferenceService 'eye'"):
        away.get(INFERENCE_SERVICES, "eye")
    away.close()


def test_a_watch_gives_every_change_in_order(api: ResourceApi, cluster: Cluster) -> None:
    def change() -> None:
        for number in range(3):
            time.sleep(0.1)
            cluster.put(KEY, service(predictor={"number": number}))
        time.sleep(0.1)
        cluster.put(("serving.kserve.io", "inferenceservices", "ear"), service() | {"metadata": {"name": "ear"}})
        cluster.remove(KEY)

    thread = threading.Thread(target=change)
    thread.start()
    seen = []
    for found in api.watch(INFERENCE_SERVICES, "eye", timeout_s=20):
        seen.append(None if found is None else found["spec"]["predictor"]["number"])
        if len(seen) > 1 and found is None:
            break
    thread.join()
    assert seen == [None, 0, 1, 2, None]
    assert cluster.watches == 1


def test_a_watch_that_is_cut_goes_on_where_it_was(api: ResourceApi, cluster: Cluster) -> None:
    cluster.put(KEY, service(predictor={"number": 0}))
    cluster.cut_watches = 3

    def change() -> None:
        for number in range(1, 6):
            time.sleep(0.15)
            cluster.put(KEY, service(predictor={"number": number}))

    thread = threading.Thread(target=change)
    thread.start()
    seen = []
    for found in api.watch(INFERENCE_SERVICES, "eye", timeout_s=20):
        assert found is not None
        seen.append(found["spec"]["predictor"]["number"])
        if seen[-1] == 5:
            break
    thread.join()
    assert seen == [0, 1, 2, 3, 4, 5]
    assert cluster.watches == 4
    assert [verb for verb, _, _ in cluster.calls].count("get") == 1


@pytest.mark.parametrize("as_event", [True, False], ids=["event", "status"])
def test_a_past_that_is_forgotten_is_read_anew(api: ResourceApi, cluster: Cluster, as_event: bool) -> None:
    cluster.put(KEY, service(predictor={"number": 0}))
    cluster.gone_as_event = as_event
    looks = api.watch(INFERENCE_SERVICES, "eye", timeout_s=20)
    first = next(looks)
    cluster.compact()
    cluster.put(KEY, service(predictor={"number": 1}))
    second = next(looks)
    looks.close()  # type: ignore[attr-defined]  # it is a generator
    assert first is not None
    assert second is not None
    assert second["spec"]["predictor"]["number"] == 1
    assert cluster.gone == 1


def test_a_watch_ends_in_time(api: ResourceApi, cluster: Cluster) -> None:
    cluster.put(KEY, service(predictor={}))
    began = time.monotonic()
    assert len(list(api.watch(INFERENCE_SERVICES, "eye", timeout_s=1.2))) == 1
    assert 1 <= time.monotonic() - began < 10


def test_kinds_know_their_groups() -> None:
    groups = [kind.group for kind in (INFERENCE_SERVICES, SERVING_RUNTIMES, LEASES, ROUTES)]
    assert groups == ["serving.kserve.io", "serving.kserve.io", "coordination.k8s.io", "gateway.networking.k8s.io"]
