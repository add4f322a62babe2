"""`nvila drift`: a reference of one's own data, and the report of a server's traffic."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nvila_platform.drift.reference import Reference
from nvila_platform.drift.watch import DriftWatch

Serve = Callable[[type[BaseHTTPRequestHandler]], AbstractContextManager[int]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sixty bright pictures with questions, one of them missing its file."""
    rows = []
    for number in range(60):
        Image.new("L", (40 + number % 5, 30), 180 + number).convert("RGB").save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nhow bright?"}, {"from": "gpt", "value": "very"}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "7.png").unlink()
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def reference(nvila: Callable[..., Any], data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "out" / "drift.json"
    assert nvila("drift", "reference", data, "--out", path).code == 0
    return path


@pytest.fixture
def endpoint(reference: Path, serve_http: Serve) -> Iterator[tuple[str, DriftWatch, list[str]]]:
    """A server that offers `/drift` to who has the key, the watch behind it, and the keys that it was given."""
    watch = DriftWatch(Reference.read(reference), share=1, least=20)
    keys: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers.get("Authorization", ""))
            denied = keys[-1] == "Bearer wrong"
            body = b"{}" if denied else json.dumps(watch.to_dict()).encode()
            self.send_response(401 if denied else 200 if self.path == "/drift" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with serve_http(Handler) as port:
        yield f"http://127.0.0.1:{port}", watch, keys


def test_a_reference_describes_what_can_be_used(
    nvila: Callable[..., Any], data: Path, reference: Path, tmp_path: Path
) -> None:
    made = Reference.read(reference)
    assert made.samples == 59
    assert sum(made.features["brightness"].counts) == 59
    assert made.features["answer_letters"].edges[0] == 4
    done = nvila("drift", "reference", data, "--out", tmp_path / "few.json", "--limit", "10", "--json")
    assert done.last_json["samples"] == 9
    assert done.last_json["skipped"] == 1
    assert "brightness" in done.last_json["features"]


def test_the_report_tells_steady_from_drifted(
    nvila: Callable[..., Any], endpoint: tuple[str, DriftWatch, list[str]], tmp_path: Path
) -> None:
    url, watch, _ = endpoint
    assert "-  too few" in nvila("drift", "report", url).out
    for number in range(60):
        watch.add({"brightness": [(180 + number) / 255]})
    done = nvila("drift", "report", url)
    assert done.code == 0
    (line,) = (line for line in done.out.splitlines() if line.split()[0] == "brightness")
    assert "steady" in line
    for _ in range(600):
        watch.add({"brightness": [0.1]})
    page = tmp_path / "pages" / "drift.html"
    done = nvila("drift", "report", f"{url}/", "--html", page)
    assert done.code == 1
    assert done.out.splitlines()[1].split()[0] == "brightness"
    assert "drifted" in done.out.splitlines()[1]
    text = page.read_text()
    assert "brightness: drifted" in text
    assert text.count("<svg") == len(watch.reference.features)
    assert nvila("drift", "report", url, "--json").last_json["drifted"] == ["brightness"]


@pytest.mark.usefixtures("all_closed")
def test_the_key_is_taken_from_the_option_or_the_environment(
    nvila: Callable[..., Any], endpoint: tuple[str, DriftWatch, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _, keys = endpoint
    nvila("drift", "report", url)
    monkeypatch.setenv("NVILA_API_KEY", "from-outside")
    nvila("drift", "report", url)
    nvila("drift", "report", url, "--api-key", "given")
    assert keys == ["", "Bearer from-outside", "Bearer given"]
    done = nvila("drift", "report", url, "--api-key", "wrong")
    assert done.code == 2
    assert "give a key with --api-key" in done.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "no subject is named"),
        (("refrence", "x"), 2, "reference"),
        (("reference",), 2, "reference takes one data, 0 are named"),
        (("report", "a", "b"), 2, "report takes one address, 2 are named"),
        (("reference", "mine.json"), 2, "name it with --out"),
        (("report", "drift.json"), 2, "drift.json is no address of a server"),
        (("report", "http://127.0.0.1:9"), 75, "http://127.0.0.1:9/drift does not answer"),
    ],
)
def test_wrong_usage_is_one_line(nvila: Callable[..., Any], words: tuple[str, ...], code: int, said: str) -> None:
    done = nvila("drift", *words)
    assert done.code == code
    assert said in done.err


def test_a_server_that_does_not_watch_is_named(
    nvila: Callable[..., Any], endpoint: tuple[str, DriftWatch, list[str]]
) -> None:
    url, _, _ = endpoint
    done = nvila("drift", "report", f"{url}/elsewhere")
    assert done.code == 2
    assert "start the server with --drift FILE" in done.err
