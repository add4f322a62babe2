"""scripts/images.py with stand-ins of the programs that build: tags, build arguments, digests, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import images
import pytest
import yaml
from release import ROOT, checked_version

VERSION = checked_version(ROOT)
DIGEST = "sha256:" + "0b" * 32
STUB = """#!/bin/bash
echo "$*" >> "{log}"
while [ $# -gt 0 ]; do
    if [ "$1" = --digestfile ]; then echo "{digest}" > "$2"; fi
    if [ "$1" = inspect ]; then cat "{inspected}"; fi
    shift
done
"""
Engine = Callable[..., Path]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Put a program on PATH that writes down what it is asked; returns where."""

    def install(name: str, inspected: object = ()) -> Path:
        folder, log = tmp_path / "bin", tmp_path / "log"
        folder.mkdir(exist_ok=True)
        (tmp_path / "inspected").write_text(json.dumps(inspected))
        (folder / name).write_text(STUB.format(log=log, digest=DIGEST, inspected=tmp_path / "inspected"))
        (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return log

    return install


def builds(log: Path) -> dict[str, dict[str, str]]:
    """Return the build arguments of each tag."""
    found = {}
    for line in log.read_text().splitlines():
        if line.startswith("build"):
            pairs = (pair.partition("=") for pair in re.findall(r"--build-arg (\S+)", line))
            (tag,) = re.findall(r"--tag (\S+)", line)
            found[tag] = {key: value for key, _, value in pairs}
    return found


def test_each_kind_of_torch_has_a_tag_of_its_own(engine: Engine) -> None:
    log = engine("podman")
    assert images.main(["--engine", "podman"]) == 0
    assert images.main(["--engine", "podman", "--cpu"]) == 0
    found = builds(log)
    small = {f"nvila/serve:{VERSION}-cpu", f"nvila/train:{VERSION}-cpu"}
    assert found.keys() == {f"nvila/{name}:{VERSION}" for name in images.IMAGES} | small
    assert {tag for tag, arguments in found.items() if "PIP_EXTRA_INDEX_URL" in arguments} == small


def test_transformer_engine_stands_on_the_pinned_images_of_cuda(engine: Engine) -> None:
    log = engine("docker")
    assert images.main(["train", "--engine", "docker", "--transformer-engine"]) == 0
    ((tag, arguments),) = builds(log).items()
    assert tag == f"nvila/train:{VERSION}-te"
    assert re.fullmatch(r"nvidia/cuda:\S+-devel-\S+@sha256:[0-9a-f]{64}", arguments["BUILD_IMAGE"])
    assert re.fullmatch(r"nvidia/cuda:\S+-runtime-\S+@sha256:[0-9a-f]{64}", arguments["BASE_IMAGE"])
    assert re.fullmatch(r"transformer-engine\[pytorch\]==[0-9.]+", arguments["TRANSFORMER_ENGINE"])
    # The Dockerfile takes all of them.
    text = (ROOT / "docker" / "train.Dockerfile").read_text(encoding="utf-8")
    assert all(re.search(rf"^ARG {name}\b", text, re.MULTILINE) for name in arguments)


def test_of_all_images_only_training_gets_transformer_engine(engine: Engine) -> None:
    log = engine("podman")
    assert images.main(["--engine", "podman", "--transformer-engine"]) == 0
    found = builds(log)
    assert len(found) == len(images.IMAGES)
    assert [tag for tag, arguments in found.items() if "TRANSFORMER_ENGINE" in arguments] == [
        f"nvila/train:{VERSION}-te"
    ]


@pytest.mark.parametrize("program", ["docker", "podman", "buildah"])
def test_pushed_images_are_pinned_in_values_of_the_charts(engine: Engine, program: str, tmp_path: Path) -> None:
    registry = "registry.example.com/nvila"
    elsewhere = f"other.example.com/nvila/serve@sha256:{'0c' * 32}"
    kept = [elsewhere, *(f"{registry}/{name}@{DIGEST}" for name in images.IMAGES)]
    log = engine(program, inspected=[{"RepoDigests": kept}])
    file = tmp_path / "digests.yaml"
    words = ["--engine", program, "--registry", registry, "--push", "--digests", str(file)]
    assert images.main(words) == 0
    pushed = [line.split()[-1] for line in log.read_text().splitlines() if line.startswith("push")]
    assert pushed == [f"{registry}/{name}:{VERSION}" for name in images.IMAGES]
    text = file.read_text(encoding="utf-8")
    assert yaml.safe_load(text) == {
        "nvila-platform": {"image": {"digest": DIGEST}, "mlflow": {"image": {"digest": DIGEST}}},
        "nvila-serving": {"image": {"digest": DIGEST, "variant": ""}},
    }
    assert f"image: {registry}/train@{DIGEST}" in text


def test_the_places_of_digests_are_those_of_the_charts() -> None:
    for chart, *keys in images.DIGEST_VALUES.values():
        place = yaml.safe_load((ROOT / "charts" / chart / "values.yaml").read_text(encoding="utf-8"))
        for key in keys:
            place = place[key]
        assert place["digest"] == ""


def test_training_alone_has_no_place_in_the_charts(engine: Engine, tmp_path: Path) -> None:
    engine("buildah")
    file = tmp_path / "digests.yaml"
    assert images.main(["train", "--engine", "buildah", "--push", "--digests", str(file)]) == 0
    assert yaml.safe_load(file.read_text(encoding="utf-8")) == {}
    assert f"image: nvila/train@{DIGEST}" in file.read_text(encoding="utf-8")


def test_a_push_without_a_digest_is_no_success(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine("docker", inspected=[{"RepoDigests": []}])
    file = tmp_path / "digests.yaml"
    assert images.main(["serve", "--engine", "docker", "--push", "--digests", str(file)]) == 1
    assert "does not say under which digest" in capsys.readouterr().err
    assert not file.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--digests", "x.yaml"], "--digests are those of a registry: add --push"),
        (["--transformer-engine", "--cpu"], "--transformer-engine needs CUDA"),
        (["--transformer-engine", "--base", "debian:12"], "leave --base out"),
        (["serve", "--transformer-engine"], "is of the image train"),
        (["sever"], "sever: there is no such image; there are mlflow, pipelines, serve, train"),
    ],
)
def test_wrong_use_is_one_line(engine: Engine, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    log = engine("podman")
    assert images.main([*words, "--engine", "podman"]) == 1
    assert said in capsys.readouterr().err
    assert not log.exists()
