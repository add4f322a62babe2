"""A small API server of Kubernetes over real HTTP: resources, watches, logs of pods, and the ways in which one fails.

It keeps what it is given and runs nothing: a test, or a controller of a test, writes the status and the logs.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

Document = dict[str, Any]
# Group, resource and namespace.
Place = tuple[str, str, str]
_CORE = ("", "pods")


@dataclass(frozen=True)
class Call:
    """What a request asked for, in the words of an RBAC rule."""

    verb: str
    group: str
    resource: str


@dataclass
class Trouble:
    """How answers to some requests fail: by a status, or by a connection that breaks."""

    matches: Callable[[Call], bool]
    times: int
    status: int = 0
    body: str = ""
    # Bytes of a body that still go out before the connection breaks.
    after_bytes: int = 0


@dataclass
class PodLog:
    """Lines with their times; open until the container has ended."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    closed: bool = False


class Cluster:
    """What the server knows. Every change goes through `changed`, which wakes watches and followers of logs."""

    def __init__(self, namespace: str = "team") -> None:
        self.namespace = namespace
        self.objects: dict[Place, dict[str, Document]] = {}
        self.logs: dict[str, PodLog] = {}
        self.asked: Counter[Call] = Counter()
        self.troubles: list[Trouble] = []
        self.forbidden: set[Call] = set()
        self.groups: set[str] | None = None
        self.validate: Callable[[Document], list[str]] = lambda _: []
        self.on_create: Callable[[Document], None] = lambda _: None
        # Returns whether the object goes at once; otherwise it stays with a deletionTimestamp until `remove`.
        self.on_delete: Callable[[Document], bool] = lambda _: True
        self.changed = threading.Condition(threading.RLock())
        self.closing = False
        self._history: list[tuple[int, str, Place, Document]] = []
        self._version = 0

    @property
    def calls(self) -> set[Call]:
        """What was asked for so far."""
        with self.changed:
            return set(self.asked)

    def calls_of(self, verb: str, resource: str) -> int:
        """Return how often something was asked for."""
        with self.changed:
            return sum(times for call, times in self.asked.items() if (call.verb, call.resource) == (verb, resource))

    def put(self, group: str, resource: str, document: Document, namespace: str | None = None) -> Document:
        """Write an object as a controller does, and return it."""
        with self.changed:
            place = (group, resource, namespace or self.namespace)
            name = document["metadata"]["name"]
            known = self.objects.setdefault(place, {})
            self._version += 1
            metadata = {"uid": f"uid-{self._version}", "namespace": place[2]} | known.get(name, {}).get("metadata", {})
            metadata |= document["metadata"] | {"resourceVersion": str(self._version)}
            self._record("MODIFIED" if name in known else "ADDED", place, document | {"metadata": metadata})
            known[name] = document | {"metadata": metadata}
            return known[name]

    def remove(self, group: str, resource: str, name: str, namespace: str | None = None) -> Document | None:
        """Take an object away."""
        with self.changed:
            place = (group, resource, namespace or self.namespace)
            found = self.objects.get(place, {}).pop(name, None)
            if found is not None:
                self._version += 1
                self._record("DELETED", place, found)
                if resource == "pods" and name in self.logs:
                    self.logs[name].closed = True
            return found

    def get(self, group: str, resource: str, name: str, namespace: str | None = None) -> Document | None:
        """Return an object."""
        with self.changed:
            return self.objects.get((group, resource, namespace or self.namespace), {}).get(name)

    def all(self, group: str, resource: str, namespace: str | None = None) -> list[Document]:
        """Return all objects of a kind."""
        with self.changed:
            return list(self.objects.get((group, resource, namespace or self.namespace), {}).values())

    def log(self, pod: str, *lines: str, at: str | None = None, closed: bool = False) -> None:
        """Append lines to a pod's log, at a time that is given or a new one each."""
        with self.changed:
            kept = self.logs.setdefault(pod, PodLog())
            for line in lines:
                kept.lines.append((at or stamp(), line))
            kept.closed = kept.closed or closed
            self.changed.notify_all()

    def break_next(self, verb: str, resource: str, times: int = 1, *, status: int = 0, body: str = "",
                   after_bytes: int = 0) -> None:  # fmt: skip
        """Let the next requests of a kind fail."""
        matches = lambda call: (call.verb, call.resource) == (verb, resource)  # noqa: E731  # a name would say no more
        self.troubles.append(Trouble(matches, times, status, body, after_bytes))

    def trouble(self, call: Call) -> Trouble | None:
        """Return what goes wrong with a request, once less often."""
        with self.changed:
            for one in self.troubles:
                if one.times and one.matches(call):
                    one.times -= 1
                    return one
        return None

    def after(self, version: int, place: Place) -> list[tuple[int, str, Document]]:
        """Return changes of a kind since a version."""
        with self.changed:
            return [(at, kind, found) for at, kind, where, found in self._history if at > version and where == place]

    def _record(self, kind: str, place: Place, document: Document) -> None:
        self._history.append((self._version, kind, place, document))
        self.changed.notify_all()


def stamp() -> str:
    """Return the time as the kubelet writes it."""
    now = time.time_ns()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now // 10**9))}.{now % 10**9:09d}Z"


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer("get")

    def do_POST(self) -> None:
        self._answer("create")

    def do_PATCH(self) -> None:
        self._answer("patch")

    def do_DELETE(self) -> None:
        self._answer("delete")

    def _answer(self, verb: str) -> None:
        cluster = self.server.cluster
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        group, namespace, resource, name, sub = _address(parts.path)
        if verb == "get" and not name:
            verb = "watch" if query.get("watch", "").lower() == "true" else "list"
        call = Call(verb, group, f"{resource}/{sub}" if sub else resource)
        with cluster.changed:
            cluster.asked[call] += 1
        trouble = cluster.trouble(call)
        if trouble is not None and trouble.status:
            self._say(trouble.status, trouble.body)
        elif trouble is not None and not trouble.after_bytes:
            self.close_connection = True
        elif call in cluster.forbidden:
            self._status(403, f'{resource} is forbidden: User "me" cannot {verb} resource "{call.resource}"')
        elif cluster.groups is not None and f"{group}/{parts.path.split('/')[3]}" not in cluster.groups and group:
            self._say(404, "404 page not found", "text/plain")
        elif sub == "log":
            self._log(name, query, trouble)
        elif verb == "watch":
            self._watch((group, resource, namespace), query)
        else:
            self._crud(verb, (group, resource, namespace), name, query, body)

    def _crud(self, verb: str, place: Place, name: str, query: Mapping[str, str], body: Any) -> None:
        cluster = self.server.cluster
        found = cluster.objects.get(place, {}).get(name or (body or {}).get("metadata", {}).get("name", ""))
        if verb == "list":
            items = [one for one in cluster.all(*place) if _selected(one, query)]
            self._say(200, json.dumps({"kind": "List", "metadata": {"resourceVersion": "0"}, "items": items}))
        elif verb == "create":
            if found is not None:
                self._status(409, f'{place[1]}.{place[0]} "{body["metadata"]["name"]}" already exists')
            elif errors := cluster.validate(body):
                self._status(422, f"{body['kind']} is invalid: {'; '.join(errors)}")
            else:
                made = cluster.put(place[0], place[1], body, place[2])
                cluster.on_create(made)
                self._say(201, json.dumps(made))
        elif found is None:
            self._status(404, f'{place[1]}.{place[0]} "{name}" not found')
        elif verb == "get":
            self._say(200, json.dumps(found))
        elif verb == "patch":
            self._say(200, json.dumps(cluster.put(place[0], place[1], _merged(found, body), place[2])))
        else:
            deleted = found | {"metadata": found["metadata"] | {"deletionTimestamp": stamp()}}
            cluster.put(place[0], place[1], deleted, place[2])
            if cluster.on_delete(deleted):
                cluster.remove(place[0], place[1], name, place[2])
            self._say(200, json.dumps(deleted))

    def _watch(self, place: Place, query: Mapping[str, str]) -> None:
        cluster = self.server.cluster
        version, end = int(query.get("resourceVersion") or 0), time.monotonic() + int(query.get("timeoutSeconds", "5"))
        self._start_stream("application/json")
        with cluster.changed:
            while time.monotonic() < end and not cluster.closing:
                for at, kind, found in cluster.after(version, place):
                    version = at
                    if _selected(found, query) and not self._chunk(json.dumps({"type": kind, "object": found}) + "\n"):
                        return
                cluster.changed.wait(max(0.0, min(0.5, end - time.monotonic())))
        self._chunk("")

    def _log(self, pod: str, query: Mapping[str, str], trouble: Trouble | None) -> None:
        cluster = self.server.cluster
        if pod not in cluster.logs:
            waiting = "container is waiting to start: ContainerCreating"
            self._status(400 if cluster.get("", "pods", pod) else 404, waiting)
            return
        # As the real one: whole seconds.
        since = query.get("sinceTime", "")[:19]
        sent, number = 0, 0
        self._start_stream("text/plain")
        with cluster.changed:
            while not cluster.closing:
                kept = cluster.logs[pod]
                while number < len(kept.lines):
                    at, line = kept.lines[number]
                    number += 1
                    if at[:19] < since:
                        continue
                    text = f"{at} {line}\n" if query.get("timestamps") == "true" else f"{line}\n"
                    if trouble is not None and sent + len(text) > trouble.after_bytes:
                        self._chunk(text[: trouble.after_bytes - sent])
                        self.close_connection = True
                        self.connection.close()
                        return
                    sent += len(text)
                    if not self._chunk(text):
                        return
                if kept.closed or query.get("follow") != "true":
                    break
                cluster.changed.wait(0.5)
        self._chunk("")

    def _start_stream(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()

    def _chunk(self, text: str) -> bool:
        data = text.encode()
        try:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
        except OSError:
            # The reader has gone.
            self.close_connection = True
            return False
        return True

    def _status(self, code: int, message: str) -> None:
        self._say(code, json.dumps({"kind": "Status", "code": code, "message": message}))

    def _say(self, code: int, text: str, kind: str = "application/json") -> None:
        data = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.cluster = cluster

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a reader that goes away, or a connection that a test broke."""


@dataclass(frozen=True)
class FakeKubernetes:
    """A running server."""

    cluster: Cluster
    port: int

    @property
    def address(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(cluster: Cluster, tls: ssl.SSLContext | None = None) -> Iterator[FakeKubernetes]:
    """Serve a cluster on loopback for the time of a `with` block."""
    server = _Server(cluster)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield FakeKubernetes(cluster, server.server_port)
    finally:
        with cluster.changed:
            cluster.closing = True
            cluster.changed.notify_all()
        server.shutdown()
        server.server_close()
        thread.join()


def write_kubeconfig(path: Path, address: str, namespace: str = "team") -> None:
    """Write a kubeconfig that leads to a server."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": namespace}}],
        "clusters": [{"name": "here", "cluster": {"server": address}}],
        "users": [{"name": "me", "user": {"token": "secret"}}],
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


def _address(path: str) -> tuple[str, str, str, str, str]:
    """Return group, namespace, resource, name and subresource of a path."""
    words = path.strip("/").split("/")
    group, rest = ("", words[2:]) if words[0] == "api" else (words[1], words[3:])
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2:
        namespace, rest = rest[1], rest[2:]
    resource, name, sub = (*rest, "", "")[:3]
    return group, namespace, resource, name, sub


def _selected(document: Document, query: Mapping[str, str]) -> bool:
    labels = document["metadata"].get("labels", {})
    for pair in filter(None, query.get("labelSelector", "").split(",")):
        key, _, value = pair.partition("=")
        if labels.get(key) != value:
            return False
    for pair in filter(None, query.get("fieldSelector", "").split(",")):
        dotted, _, value = pair.partition("=")
        found: Any = document
        for key in dotted.split("."):
            found = found.get(key, {})
        if found != value:
            return False
    return True


def _merged(base: Any, over: Any) -> Any:
    """Merge as a JSON merge patch does: null takes a key away."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key), value)
    return merged
