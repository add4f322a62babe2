"""An API server of Kubernetes in memory, over real HTTP on loopback: what this project's code asks of one.

Resources are read, listed, created, applied (server-side, with managers of fields), deleted and watched, with versions,
generations and strict validation by the custom resource definitions. Tests say what goes wrong.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Document = dict[str, Any]
Key = tuple[str, str, str]  # group, plural, name
TOKEN = "secret"
NAMESPACE = "models"
KINDS = {
    "inferenceservices": "InferenceService",
    "servingruntimes": "ServingRuntime",
    "leases": "Lease",
    "httproutes": "HTTPRoute",
}


@dataclass
class Cluster:
    """What a test sees and says of its cluster.

    Args:
        errors: Returns what is wrong with a manifest of a custom resource.
        groups: API groups that are served, beside those of Kubernetes.
    """

    errors: Callable[[Document], list[str]] = lambda document: []
    groups: set[str] = field(default_factory=lambda: {"serving.kserve.io", "gateway.networking.k8s.io"})
    resources: dict[Key, Document] = field(default_factory=dict)
    applied: dict[tuple[Key, str], Document] = field(default_factory=dict)
    history: list[tuple[int, str, Key, Document]] = field(default_factory=list)
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    denied: set[tuple[str, str]] = field(default_factory=set)
    failing: list[int] = field(default_factory=list)
    on_write: list[Callable[[Cluster, Key], None]] = field(default_factory=list)
    expired: bool = False
    ahead_s: float = 0.0
    compacted: int = 0
    gone_as_event: bool = True
    cut_watches: int = 0
    watches: int = 0
    closing: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)
    _version: int = 100

    def put(self, key: Key, document: Document, *, status_only: bool = False) -> Document:
        """Store a resource and tell those who watch it."""
        with self.changed:
            old = self.resources.get(key)
            self._version += 1
            metadata = document["metadata"]
            metadata |= {"resourceVersion": str(self._version), "namespace": NAMESPACE, "uid": f"uid-{key[2]}"}
            generation = (old or {}).get("metadata", {}).get("generation", 0)
            if not status_only and (old is None or old.get("spec") != document.get("spec")):
                generation += 1
            metadata["generation"] = generation
            self.resources[key] = document
            copy: Document = json.loads(json.dumps(document))
            self.history.append((self._version, "MODIFIED" if old else "ADDED", key, copy))
            self.changed.notify_all()
        if not status_only:
            for hook in self.on_write:
                hook(self, key)
        return copy

    def set_status(self, key: Key, status: Document) -> None:
        """Change the status of a resource, as a controller does."""
        with self.changed:
            if key in self.resources:
                self.put(key, self.resources[key] | {"status": status}, status_only=True)

    def remove(self, key: Key) -> None:
        """Delete a resource."""
        with self.changed:
            old = self.resources.pop(key)
            self.applied = {entry: one for entry, one in self.applied.items() if entry[0] != key}
            self._version += 1
            old["metadata"]["resourceVersion"] = str(self._version)
            self.history.append((self._version, "DELETED", key, old))
            self.changed.notify_all()

    def compact(self) -> None:
        """Forget the past, so that a watch from a version in it is answered with 410."""
        with self.changed:
            self._version += 1
            self.compacted = self._version

    def named(self, plural: str, name: str) -> Document | None:
        """Return a resource."""
        found = [document for (_, kind, one), document in self.resources.items() if (kind, one) == (plural, name)]
        return json.loads(json.dumps(found[0])) if found else None

    @property
    def version(self) -> int:
        return self._version


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate((timestamp or time.time()) + self.server.cluster.ahead_s, usegmt=True)

    def do_GET(self) -> None:
        self.handle_request("get")

    def do_POST(self) -> None:
        self.handle_request("create")

    def do_PATCH(self) -> None:
        self.handle_request("patch")

    def do_DELETE(self) -> None:
        self.handle_request("delete")

    def handle_request(self, verb: str) -> None:
        cluster = self.server.cluster
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if cluster.failing:
            return self.say(*status(cluster.failing.pop(0), "InternalError", "etcd is away"))
        if cluster.expired or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.say(*status(401, "Unauthorized", "Unauthorized"))
        if url.path == "/apis":
            groups = [{"name": name, "versions": [{"version": "v1"}]} for name in sorted(cluster.groups)]
            return self.say(200, {"kind": "APIGroupList", "groups": groups})
        _, _, group, _, _, namespace, plural, *rest = url.path.split("/")
        name = rest[0] if rest else ""
        if verb == "get" and not name:
            verb = "watch" if query.get("watch") else "list"
        cluster.calls.append((verb, group, plural))
        if group not in cluster.groups | {"coordination.k8s.io"}:
            return self.say_text(404, "404 page not found\n")
        if (verb, plural) in cluster.denied:
            text = f'{plural}.{group} "{name}" is forbidden: User "me" cannot {verb} resource "{plural}"'
            return self.say(*status(403, "Forbidden", f'{text} in API group "{group}" in the namespace "{namespace}"'))
        work: Callable[[Key, Document, dict[str, str]], None] = getattr(self, f"answer_{verb}")
        return work((group, plural, name), body, query)

    def answer_get(self, key: Key, body: Document, query: dict[str, str]) -> None:
        found = self.server.cluster.resources.get(key)
        self.say(200, found) if found is not None else self.say(*missing(key))

    def answer_list(self, key: Key, body: Document, query: dict[str, str]) -> None:
        cluster = self.server.cluster
        items = [document for one, document in cluster.resources.items() if one[1] == key[1]]
        items = [document for document in items if selected(document, query)]
        self.say(200, {"metadata": {"resourceVersion": str(cluster.version)}, "items": items})

    def answer_create(self, key: Key, body: Document, query: dict[str, str]) -> None:
        made = (key[0], key[1], body["metadata"]["name"])
        if made in self.server.cluster.resources:
            self.say(*status(409, "AlreadyExists", f'{key[1]} "{made[2]}" already exists'))
        else:
            self.say(201, self.server.cluster.put(made, body))

    def answer_delete(self, key: Key, body: Document, query: dict[str, str]) -> None:
        if key not in self.server.cluster.resources:
            self.say(*missing(key))
        else:
            self.server.cluster.remove(key)
            self.say(200, {"kind": "Status", "status": "Success"})

    def answer_patch(self, key: Key, body: Document, query: dict[str, str]) -> None:
        cluster, manager = self.server.cluster, query["fieldManager"]
        assert self.headers["Content-Type"] == "application/apply-patch+yaml"
        assert query["fieldValidation"] == "Strict"
        with cluster.changed:
            old = cluster.resources.get(key)
            version = body["metadata"].pop("resourceVersion", None)
            if version is not None and (old is None or old["metadata"]["resourceVersion"] != version):
                return self.say(*status(409, "Conflict", "the object has been modified; apply your changes again"))
            # Definitions say nothing about kinds of Kubernetes' own.
            wrong = cluster.errors(manifest_of(body)) if key[0] in ("serving.kserve.io",) else []
            if wrong:
                text = f'{body["kind"]} "{key[2]}" is invalid: {"; ".join(wrong)}'
                return self.say(*status(422, "Invalid", text))
            others = {who: one for (where, who), one in cluster.applied.items() if where == key and who != manager}
            clash = [who for who, one in others.items() if conflicts(one, body)]
            if clash:
                causes = [{"reason": "FieldManagerConflict", "message": f'conflict with "{clash[0]}"'}]
                return self.say(*status(409, "Conflict", f'Apply failed with 1 conflict: "{clash[0]}"', causes))
            before = cluster.applied.get((key, manager), {})
            cluster.applied[(key, manager)] = json.loads(json.dumps(body))
            merged = merge(without(json.loads(json.dumps(old or {})), before, body), body)
            made = cluster.put(key, merged)
        self.say(200 if old else 201, cluster.resources.get(key, made))
        return None

    def answer_watch(self, key: Key, body: Document, query: dict[str, str]) -> None:
        cluster = self.server.cluster
        cluster.watches += 1
        seen = int(query["resourceVersion"])
        if seen < cluster.compacted and not cluster.gone_as_event:
            return self.say(*status(410, "Expired", "too old resource version"))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        deadline = time.monotonic() + float(query["timeoutSeconds"])
        if seen < cluster.compacted:
            _, gone = status(410, "Expired", "too old resource version")
            self.chunk({"type": "ERROR", "object": gone})
            deadline = 0
        while time.monotonic() < deadline and not cluster.closing:
            with cluster.changed:
                news = [one for one in cluster.history if one[0] > seen and one[2][1] == key[1]]
                if not news:
                    cluster.changed.wait(min(0.2, max(0.0, deadline - time.monotonic())))
                    continue
            for number, kind, _, document in news:
                seen = number
                if selected(document, query):
                    self.chunk({"type": kind, "object": document})
                if cluster.cut_watches > 0:
                    cluster.cut_watches -= 1
                    self.close_connection = True
                    return None  # without the last chunk: the client sees a connection that broke
        self.wfile.write(b"0\r\n\r\n")
        return None

    def chunk(self, event: Document) -> None:
        data = json.dumps(event).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def say(self, code: int, body: Document) -> None:
        self.say_text(code, json.dumps(body))

    def say_text(self, code: int, text: str) -> None:
        data = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cluster = cluster


@contextmanager
def serving(cluster: Cluster) -> Iterator[str]:
    """Serve a cluster; gives its address."""
    server = Server(cluster)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        cluster.closing = True
        server.shutdown()
        server.server_close()
        thread.join()


def kubeconfig(address: str, namespace: str = NAMESPACE) -> Document:
    """Return the content of a kubeconfig that leads to a cluster."""
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": namespace}}],
        "clusters": [{"name": "here", "cluster": {"server": address}}],
        "users": [{"name": "me", "user": {"token": TOKEN}}],
    }


def status(code: int, reason: str, text: str, causes: list[Document] | None = None) -> tuple[int, Document]:
    details = {"causes": causes} if causes else {}
    return code, {"kind": "Status", "code": code, "reason": reason, "message": text, "details": details}


def missing(key: Key) -> tuple[int, Document]:
    return status(404, "NotFound", f'{key[1]}.{key[0]} "{key[2]}" not found')


def selected(document: Document, query: dict[str, str]) -> bool:
    name = query.get("fieldSelector", "").removeprefix("metadata.name=")
    label, equal, value = query.get("labelSelector", "").partition("=")
    marks = document["metadata"].get("labels") or {}
    if name and document["metadata"]["name"] != name:
        return False
    return not label or (marks.get(label) == value if equal else label in marks)


def manifest_of(document: Document) -> Document:
    """Leave out what only the server sets."""
    kept = {key: value for key, value in document["metadata"].items() if key in METADATA}
    return {key: value for key, value in document.items() if key != "status"} | {"metadata": kept}


METADATA = ("name", "namespace", "labels", "annotations")


def merge(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: merge(old.get(key), value) for key, value in new.items()}
    return new


def without(document: Any, before: Any, now: Any) -> Any:
    """Take out what a manager set before and sets no longer."""
    if not (isinstance(document, dict) and isinstance(before, dict)):
        return document
    kept = {}
    for key, value in document.items():
        if key in before and isinstance(now, dict) and key not in now:
            continue
        kept[key] = without(value, before.get(key), now.get(key) if isinstance(now, dict) else None)
    return kept


def conflicts(other: Any, mine: Any) -> bool:
    """Whether two managers want different values of one field."""
    if isinstance(other, dict) and isinstance(mine, dict):
        return any(conflicts(other[key], mine[key]) for key in other.keys() & mine.keys())
    return bool(other != mine)
