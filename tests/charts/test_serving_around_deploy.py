"""charts/nvila-serving around an endpoint that `nvila deploy` makes: they share nothing, and lead to each other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nvila_platform.cluster.inference_service import build, inference_service, labels
from nvila_platform.cluster.serving_values import parse_values

if TYPE_CHECKING:
    from tests.charts.built_in_validation import BuiltInSchemas
    from tests.charts.conftest import Document, Helm
    from tests.charts.crd_validation import CrdSchemas

    Render = Callable[..., list[Document]]

Serve = Callable[[type[BaseHTTPRequestHandler]], AbstractContextManager[int]]
CHART = Path(__file__).resolve().parents[2] / "charts" / "nvila-serving"
GATEWAY = ("--api-versions", "gateway.networking.k8s.io/v1")
HOST = "eyes-models.example.com"
SERVICE = {"name": "envoy-kserve", "namespace": "envoy-gateway-system", "host": HOST}
AROUND: dict[str, Any] = {
    "fullnameOverride": "eyes",
    "endpoint": {"create": False, "service": SERVICE},
    "route": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["eyes.example.com"]},
}


def one(documents: list[Document], kind: str) -> Document:
    (found,) = (document for document in documents if document["kind"] == kind)
    return found


def deployed() -> list[Document]:
    """Return what `nvila deploy` makes with the account of the chart."""
    values = parse_values({"serviceAccount": {"name": "eyes"}, "model": {"version": "7", "digest": "a" * 64}}, "x")
    revision, runtime = build("eyes", "models", values, "Standard", "models:/nvila/7")
    return [runtime, inference_service("eyes", revision, labels("eyes", values))]


def test_chart_and_deployment_make_different_resources(
    render: Render, built_in: BuiltInSchemas, crds: CrdSchemas
) -> None:
    documents = render(CHART, AROUND, extra=GATEWAY)
    kinds = {document["kind"] for document in documents}
    assert kinds == {"ServiceAccount", "NetworkPolicy", "PodDisruptionBudget", "HTTPRoute", "Pod"}
    assert not kinds & {document["kind"] for document in deployed()}
    for document in documents:
        schemas = crds if document["kind"] == "HTTPRoute" else built_in
        assert schemas.errors(document) == []


def test_policy_and_budget_hold_for_the_pods_of_every_revision(render: Render) -> None:
    documents = render(CHART, AROUND, extra=GATEWAY)
    endpoint = one(deployed(), "InferenceService")
    # What KServe puts on the pods of every predictor, the stable one's and the canaries'.
    pod = {"serving.kserve.io/inferenceservice": endpoint["metadata"]["name"], "component": "predictor"}
    assert one(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == pod
    assert one(documents, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == pod
    account = one(documents, "ServiceAccount")["metadata"]["name"]
    assert endpoint["spec"]["predictor"]["serviceAccountName"] == account


def test_the_route_leads_to_the_gateway_that_splits_the_traffic(render: Render) -> None:
    (rule,) = one(render(CHART, AROUND, extra=GATEWAY), "HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": "envoy-kserve", "namespace": "envoy-gateway-system", "port": 80}]
    assert rule["filters"] == [{"type": "URLRewrite", "urlRewrite": {"hostname": HOST}}]


def test_a_service_of_ones_own_is_asked_as_it_is(render: Render) -> None:
    values = {**AROUND, "endpoint": {"create": False, "service": {"name": "eyes", "port": 8000}}}
    documents = render(CHART, values, extra=GATEWAY)
    (rule,) = one(documents, "HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": "eyes", "port": 8000}]
    assert "filters" not in rule
    assert environment(documents) == {
        "MODEL_NAME": "eyes", "SERVICE": "eyes.models.svc", "PORTS": "8000", "HOST": "", "TIMEOUT_S": "120"
    }  # fmt: skip


def environment(documents: list[Document]) -> dict[str, str]:
    (container,) = one(documents, "Pod")["spec"]["containers"]
    return {variable["name"]: variable["value"] for variable in container["env"]}


def test_without_a_service_nothing_is_guessed(helm: Helm) -> None:
    alone = {"fullnameOverride": "eyes", "endpoint": {"create": False}}
    done = helm.template(CHART, alone)
    assert done.returncode != 0
    assert (
        "endpoint.create is off, and `nvila deploy` leaves a service for each revision: set endpoint.service.name"
        in (done.stderr)
    )
    # What asks nobody needs no service.
    assert helm.template(CHART, {**alone, "tests": {"enabled": False}}).returncode == 0


@pytest.mark.parametrize("key", ["host", "namespace"])
def test_half_a_service_is_refused(helm: Helm, key: str) -> None:
    done = helm.template(CHART, {"endpoint": {"service": {key: "elsewhere"}}})
    assert "belong to a service that is named: set endpoint.service.name too" in done.stderr


def test_notes_say_how_to_deploy(helm: Helm) -> None:
    values = [f"endpoint.service.{key}={value}" for key, value in SERVICE.items()]
    flags = [word for value in ["fullnameOverride=eyes", "endpoint.create=false", *values] for word in ("--set", value)]
    done = helm.run("install", "demo", CHART, "--namespace", "models", "--dry-run=client", *flags)
    assert done.returncode == 0, done.stderr
    _, _, notes = done.stdout.partition("NOTES:")
    commands = re.findall(r"^     (\S+ .+)$", notes, re.MULTILINE)
    assert commands[0] == (
        "nvila deploy models:/nvila@candidate --name eyes --namespace models serviceAccount.name=eyes"
    )
    assert [command.split()[0] for command in commands] == ["nvila", "nvila", "curl"]
    assert json.loads(re.findall(r"-d '(.+)'", commands[2])[0])["model"] == "eyes"


def gateway() -> type[BaseHTTPRequestHandler]:
    """Stand for KServe's gateway: it knows one endpoint, by its host."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers["Host"] == HOST
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"state": "ready", "model": "eyes"}).encode())

    return Handler


@pytest.mark.parametrize(("host", "passes"), [(HOST, True), ("", False)])
def test_helm_test_asks_the_gateway_for_this_endpoint(
    render: Render, serve_http: Serve, host: str, passes: bool
) -> None:
    documents = render(
        CHART, {**AROUND, "endpoint": {"create": False, "service": {**SERVICE, "host": host}}}, extra=GATEWAY
    )
    (container,) = one(documents, "Pod")["spec"]["containers"]
    env = environment(documents)
    assert env["SERVICE"] == "envoy-kserve.envoy-gateway-system.svc"
    with serve_http(gateway()) as port:
        env |= {"SERVICE": "127.0.0.1", "PORTS": str(port), "TIMEOUT_S": "1.5"}
        command = [sys.executable, *container["command"][1:], *container["args"]]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=env)
    assert (done.returncode == 0) is passes, done.stderr
