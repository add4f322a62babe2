"""`nvila lineage`: from whatever one holds back to the data, and whether it is all still as it was."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nvila_platform.artifacts import content_key, utc_now, write_manifest
from nvila_platform.registration import register_model
from nvila_platform.registry import ModelVersion, set_alias
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef, open_store

Made = dict[str, ArtifactRef]


def make(settings: Settings, step: str, files: dict[str, str], **inputs: str) -> ArtifactRef:
    store = open_store(settings)
    key = content_key(step, {}, inputs, "1+code")
    directory = store.work_dir(step, key)
    for name, text in files.items():
        (directory / name).write_text(text)
    write_manifest(
        directory, step=step, key=key, config={}, inputs=inputs, code_version="1+code", started_at=utc_now(), metrics={}
    )
    return store.publish(directory)


@pytest.fixture
def workspace(tmp_path: Path) -> Settings:
    return Settings.load(tmp_path / "nvila-workspace", {})


@pytest.fixture
def made(workspace: Settings) -> Made:
    """A model, what it was made of, and the gate that let it through."""
    data = make(workspace, "data", {"samples": "1 2 3"}, download="f" * 64)
    model = make(workspace, "train", {"weights": "w"}, data=data.digest)
    small = make(workspace, "quantize", {"weights": "s"}, model=model.digest)
    scores = make(workspace, "evaluate", {"results": "1"}, model=small.digest, data=data.digest)
    verdict = {"passed": True, "checks": [{"name": "accuracy", "passed": True}, {"name": "size", "passed": True}]}
    gate = make(workspace, "gate", {"verdict.json": json.dumps(verdict)}, quantized=scores.digest)
    return {"data": data, "train": model, "quantize": small, "evaluate": scores, "gate": gate}


@pytest.fixture
def version(workspace: Settings, made: Made) -> ModelVersion:
    tags = {"nvila.gate": made["gate"].digest, "nvila.licence": "apache-2.0"}
    found = register_model(workspace, "eyes", made["quantize"], None, tags)
    set_alias(workspace, "eyes", "champion", found.version)
    return found


@pytest.fixture
def endpoint() -> Iterator[Callable[..., str]]:
    """Start servers that say what they serve, as ours do."""
    servers: list[ThreadingHTTPServer] = []

    def start(digest: str, version: str = "1", name: str = "eyes", status: int = 200) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(
                    {"model": name, "version": version, **({"digest": digest} if digest else {})}
                ).encode()
                self.send_response(status if self.path == "/health" else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                del format, args

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_from_an_alias_to_the_data(nvila: Callable[..., Any], made: Made, version: ModelVersion) -> None:
    done = nvila("lineage", "models:/eyes@champion")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[:3] == ["model    models:/eyes/1 (champion)", "gate     passed 2 checks", "licence  apache-2.0"]
    tree = [line.split()[-3:-1] for line in lines[4:]]
    assert tree[0] == ["gate", made["gate"].digest[:12]]
    for step in ("evaluate", "quantize", "train", "data"):
        assert [step, made[step].digest[:12]] in tree
    assert lines[-1].strip() == "download: external ffffffffffff" or "external ffffffffffff" in done.out


@pytest.mark.parametrize("form", ["digest", "sha256", "folder", "file of it", "endpoint", "version"])
def test_every_way_to_ask_finds_the_same(
    nvila: Callable[..., Any], workspace: Settings, made: Made, version: ModelVersion, endpoint: Any, form: str
) -> None:
    ref = made["quantize"]
    folder = open_store(workspace).fetch(ref)
    (folder / "model").mkdir(exist_ok=True)
    asked = {
        "digest": ref.digest,
        "sha256": f"sha256:{ref.digest}",
        "folder": folder,
        "file of it": folder / "model",
        "endpoint": endpoint(f"sha256:{ref.digest}") if form == "endpoint" else "",
        "version": "models:/eyes/1",
    }[form]
    found = nvila("lineage", asked, "--json").last_json
    assert found["model"] == "models:/eyes/1"
    assert found["aliases"] == ["champion"]
    assert found["artifact"]["digest"] == ref.digest
    assert found["verdict"] == {
        "digest": made["gate"].digest,
        "passed": True,
        "checks": {"accuracy": True, "size": True},
    }
    assert (found["served"] is not None) == (form == "endpoint")


def test_an_endpoint_names_its_version_among_several(
    nvila: Callable[..., Any], workspace: Settings, made: Made, version: ModelVersion, endpoint: Any
) -> None:
    other = register_model(workspace, "another", made["quantize"], None, {})
    assert other.version == 1
    again = nvila("lineage", endpoint(made["quantize"].digest), "--json").last_json
    assert again["model"] == "models:/eyes/1"
    # Under a name of its own, as KServe gives one: the first of that version.
    again = nvila("lineage", endpoint(made["quantize"].digest, name="nvila-serving"), "--json").last_json
    assert again["model"] == "models:/another/1"
    assert (
        "serves nvila-serving, version 1"
        in nvila("lineage", endpoint(made["quantize"].digest, name="nvila-serving")).out
    )


def test_what_was_never_registered_has_a_tree_all_the_same(nvila: Callable[..., Any], made: Made) -> None:
    done = nvila("lineage", made["train"].digest)
    assert done.code == 0
    assert done.out.splitlines()[0] == "model  not registered"
    assert f"train {made['train'].digest[:12]}" in done.out


def test_verifying_names_what_is_damaged_and_what_is_gone(
    nvila: Callable[..., Any], workspace: Settings, made: Made, version: ModelVersion, tmp_path: Path
) -> None:
    done = nvila("lineage", "models:/eyes/1", "--verify")
    assert done.code == 0
    assert done.out.splitlines()[-1] == "every digest is right"
    assert "[not in the store: it came from outside]" in done.out
    store = open_store(workspace)
    (store.fetch(made["train"]) / "weights").write_text("W")
    page = tmp_path / "pages" / "lineage.html"
    done = nvila("lineage", "models:/eyes/1", "--verify", "--html", page)
    assert done.code == 1
    assert done.out.splitlines()[-1] == "damaged or gone: 1 of 6"
    (line,) = {line.strip() for line in done.out.splitlines() if "train" in line}
    assert "weights: sha256" in line
    text = page.read_text()
    assert "1 of 6 are damaged or gone" in text
    assert 'class="bad"' in text
    assert "<svg" in text
    assert "models:/eyes/1 (champion)" in text
    found = nvila("lineage", "models:/eyes/1", "--verify", "--json").last_json
    assert found["damaged"] == [made["train"].digest]
    assert found["verified"][made["data"].digest] == ""


def test_the_page_without_verifying_says_so(nvila: Callable[..., Any], made: Made, tmp_path: Path) -> None:
    page = tmp_path / "lineage.html"
    assert nvila("lineage", made["gate"].digest, "--html", page).code == 0
    text = page.read_text()
    assert "Not verified" in text
    assert "Verified</th>" not in text
    for ref in made.values():
        assert ref.digest in text


def test_a_refused_or_lost_verdict_is_told(nvila: Callable[..., Any], workspace: Settings, made: Made) -> None:
    verdict = {"passed": False, "checks": [{"name": "accuracy", "passed": False}, {"name": "size", "passed": True}]}
    refused = make(workspace, "gate", {"verdict.json": json.dumps(verdict)}, model=made["train"].digest)
    register_model(workspace, "bad", made["train"], None, {"nvila.gate": refused.digest})
    assert "gate   refused: accuracy" in nvila("lineage", "models:/bad/1").out
    register_model(workspace, "lost", made["data"], None, {"nvila.gate": "e" * 64})
    assert "gate   no verdict in the store" in nvila("lineage", "models:/lost/1").out


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        ("nowhere", 2, "nowhere is no endpoint, model, digest or folder"),
        (".", 2, ". is no artifact: it has no manifest"),
        ("models:/nobody@champion", 2, "no model 'nobody' is registered"),
        ("e" * 64, 1, f"no artifact with digest {'e' * 64} in the store"),
        ("http://127.0.0.1:9", 75, "http://127.0.0.1:9/health does not answer"),
    ],
)
def test_what_cannot_be_found_is_one_line(nvila: Callable[..., Any], asked: str, code: int, said: str) -> None:
    done = nvila("lineage", asked)
    assert done.code == code
    assert said in done.err
    assert done.out == ""


@pytest.mark.usefixtures("all_closed")
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("unknown",), 2, "serves a model of digest 'unknown'"),
        (("",), 2, "is not of `nvila serve`"),
        (("a" * 64, "1", "eyes", 404), 2, "answers 404"),
        (("a" * 64, "1", "eyes", 503), 75, "the model is not ready"),
    ],
)
def test_an_endpoint_without_lineage_is_named(
    nvila: Callable[..., Any], endpoint: Any, arguments: tuple[Any, ...], code: int, said: str
) -> None:
    done = nvila("lineage", endpoint(*arguments))
    assert done.code == code
    assert said in done.err
