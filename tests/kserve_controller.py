"""KServe's controller and a Prometheus, as far as a rollout sees them."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from tests.api_server import Cluster, Document, Key

URL = "http://eye.models.example.org"


@dataclass
class Kserve:
    """Answers every change of an InferenceService with a status, a route and pods.

    Args:
        broken: Storage addresses whose pods never get ready.
        routes: Whether it routes by the Gateway API.
        delay_s: Seconds until pods are ready.
        pods: Pods of the stable predictor, whatever its least number is.
        served: What got all traffic, in order: of Standard mode names of predictors, of Knative mode of revisions.
    """

    broken: set[str] = field(default_factory=set)
    routes: bool = True
    delay_s: float = 0.0
    pods: int = 0
    ignores_weights: bool = False
    served: list[str] = field(default_factory=list)
    seen: list[Document] = field(default_factory=list)
    _revisions: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    _rolled_out: dict[str, str] = field(default_factory=dict)
    _timers: list[threading.Timer] = field(default_factory=list)

    def __call__(self, cluster: Cluster, key: Key) -> None:
        if key[1] != "inferenceservices":
            return
        spec = json.loads(json.dumps(cluster.resources[key]["spec"]))
        self.seen.append(spec)
        if self.delay_s:
            self._settle(cluster, key, ready=False)
            timer = threading.Timer(self.delay_s, self._settle, (cluster, key), {"ready": True})
            timer.daemon = True
            self._timers.append(timer)
            timer.start()
        else:
            self._settle(cluster, key, ready=True)

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
            timer.join(1)

    def _settle(self, cluster: Cluster, key: Key, *, ready: bool) -> None:
        with cluster.changed:
            document = cluster.resources.get(key)
            if document is None:
                return
            mode = document["metadata"]["annotations"]["serving.kserve.io/deploymentMode"]
            settle = self._knative if mode == "Knative" else self._standard
            cluster.set_status(key, settle(cluster, key, document, ready=ready))

    def _standard(self, cluster: Cluster, key: Key, document: Document, *, ready: bool) -> Document:
        spec, name = document["spec"], key[2]
        stable = spec["predictor"]
        works = ready and stable["model"]["storageUri"] not in self.broken
        canaries = []
        for canary in spec.get("canary", []):
            predictor = canary["predictor"]
            fine = ready and predictor["model"]["storageUri"] not in self.broken
            status = {"name": predictor["name"], "ready": fine, "trafficPercent": canary["trafficPercent"]}
            status["modelStatus"] = model_status(fine, predictor["minReplicas"])
            canaries.append(status)
        if works:
            self._serve(stable["name"])
        self._route(cluster, name, stable["name"], canaries)
        return {
            "observedGeneration": document["metadata"]["generation"],
            "url": URL,
            "conditions": conditions(works),
            "modelStatus": model_status(works, max(self.pods, stable["minReplicas"])),
            "canaryStatuses": canaries,
        }

    def _route(self, cluster: Cluster, name: str, stable: str, canaries: list[Document]) -> None:
        if not self.routes:
            return
        shares = {one["name"]: one["trafficPercent"] for one in canaries if one["ready"] and one["trafficPercent"]}
        if self.ignores_weights:
            shares = {}
        refs = [{"name": f"{name}-{stable}-predictor", "weight": 100 - sum(shares.values()), "port": 80}]
        refs += [{"name": f"{name}-{one}-predictor", "weight": share, "port": 80} for one, share in shares.items()]
        key = ("gateway.networking.k8s.io", "httproutes", name)
        cluster.put(key, {"metadata": {"name": name}, "spec": {"rules": [{"backendRefs": refs}]}})

    def _knative(self, cluster: Cluster, key: Key, document: Document, *, ready: bool) -> Document:
        name, predictor = key[2], dict(document["spec"]["predictor"])
        percent = predictor.pop("canaryTrafficPercent", None)
        text = json.dumps(predictor, sort_keys=True)
        revisions = self._revisions.setdefault(name, [])
        if not revisions or revisions[-1][1] != text:
            revisions.append((f"{name}-predictor-{len(revisions) + 1:05}", text))
        newest = revisions[-1][0]
        works = ready and predictor["model"]["storageUri"] not in self.broken
        old = self._rolled_out.get(name, "")
        if works and percent is None:
            self._rolled_out[name] = newest
            self._serve(newest)
        shares = {newest: percent, old: 100 - percent} if works and percent is not None and old else {newest: 100}
        if not works and old:
            shares = {old: 100}
        component = {
            "latestCreatedRevision": newest,
            "latestReadyRevision": newest if works else old,
            "latestRolledoutRevision": self._rolled_out.get(name, ""),
            "previousRolledoutRevision": old,
            "traffic": [{"revisionName": one, "percent": share} for one, share in shares.items()],
        }
        return {
            "observedGeneration": document["metadata"]["generation"],
            "url": URL,
            "conditions": conditions(works),
            "modelStatus": model_status(works, 1),
            "components": {"predictor": component},
        }

    def _serve(self, name: str) -> None:
        if not self.served or self.served[-1] != name:
            self.served.append(name)


def conditions(works: bool) -> list[Document]:
    if works:
        return [{"type": "PredictorReady", "status": "True"}, {"type": "Ready", "status": "True"}]
    return [
        {"type": "PredictorReady", "status": "False", "reason": "MinimumReplicasUnavailable", "message": "0 of 1 pods"},
        {"type": "Ready", "status": "False"},
    ]


def model_status(works: bool, pods: int) -> Document:
    if works:
        return {"copies": {"failedCopies": 0, "totalCopies": pods}, "transitionStatus": "UpToDate"}
    failure = {"reason": "ModelLoadFailed", "message": "weights.safetensors is damaged", "exitCode": 1}
    return {"copies": {"failedCopies": 1, "totalCopies": 0}, "lastFailureInfo": failure}


@dataclass
class Users:
    """What users of an endpoint get, as Prometheus has it: of all revisions, and of single ones.

    Args:
        ok: Requests that were answered.
        failed: Requests that the server failed on.
        ttft_s: 95th percentile of the time to the first token; None for none.
        of: Other values of revisions whose pods' names hold a text.
        down: Status that it answers with instead.
        queries: What was asked.
    """

    ok: float = 100
    failed: float = 0
    ttft_s: float | None = 0.2
    of: dict[str, dict[str, float | None]] = field(default_factory=dict)
    down: int = 0
    queries: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)

    def answer(self, query: str) -> float | None:
        pods = re.findall(r'pod=~"([^"]*)"', query)[0]
        values: dict[str, float | None] = {"ok": self.ok, "failed": self.failed, "ttft_s": self.ttft_s}
        for part, own in self.of.items():
            if part in pods:
                values |= own
        if "nvila:time_to_first_token_seconds_bucket" in query:
            return values["ttft_s"]
        return values["failed"] if "nvila:request_rejected_total" in query else values["ok"]


class _Prometheus(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def do_POST(self) -> None:
        users = self.server.users
        body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        users.queries.append(body["query"][0])
        users.tokens.append(self.headers.get("Authorization", ""))
        if users.down or self.path != "/api/v1/query":
            self.send_error(users.down or 404)
            return
        value = users.answer(body["query"][0])
        result = [] if value is None else [{"metric": {}, "value": [0, str(value)]}]
        data = json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    def __init__(self, users: Users) -> None:
        super().__init__(("127.0.0.1", 0), _Prometheus)
        self.users = users


@contextmanager
def prometheus(users: Users) -> Iterator[str]:
    """Serve what users get; gives its address."""
    server = _Server(users)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
