"""scripts/release.py: one version, whole or nothing, the same bytes again, and a wheel that installs elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import release
import yaml

ROOT = Path(__file__).resolve().parents[1]


def git(root: Path, *arguments: str) -> None:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false", *arguments]
    subprocess.run(command, cwd=root, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What the checks of a release read, committed."""
    root = tmp_path / "tree"
    for name in release.CHARTS:
        (root / "charts" / name).mkdir(parents=True)
        shutil.copy(ROOT / "charts" / name / "Chart.yaml", root / "charts" / name)
    for name in ("values.yaml", "files/image-digests.yaml"):
        (root / "charts" / "nvila-platform" / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "charts" / "nvila-platform" / name, root / "charts" / "nvila-platform" / name)
    shutil.copytree(ROOT / "docker", root / "docker")
    shutil.copy(ROOT / "charts" / "released.json", root / "charts")
    (root / "model" / "nvila").mkdir(parents=True)
    shutil.copy(ROOT / "model" / "nvila" / "_version.py", root / "model" / "nvila")
    (root / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n- All of it.\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "Start")
    return root


def date_the_changelog(root: Path) -> None:
    path = root / "CHANGELOG.md"
    path.write_text(path.read_text().replace("[Unreleased]", "[0.1.0] - 2026-11-26"))


def test_the_project_itself_has_one_version() -> None:
    assert release.checked_version(ROOT) == (ROOT / "model/nvila/_version.py").read_text().split('"')[-2]


def test_a_rehearsal_takes_what_a_final_release_refuses(tree: Path) -> None:
    (tree / "new.txt").touch()
    assert release.checked_version(tree) == "0.1.0"
    with pytest.raises(release.ReleaseError, match=r"no section `## \[0.1.0\] - YYYY-MM-DD`"):
        release.checked_version(tree, final=True)
    date_the_changelog(tree)
    with pytest.raises(release.ReleaseError, match=r"2 uncommitted changes, such as .*CHANGELOG.md"):
        release.checked_version(tree, final=True)
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "-m", "Release")
    assert release.checked_version(tree, final=True) == "0.1.0"


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("charts/nvila-serving/Chart.yaml", "\nversion: 0.1.0", "\nversion: 0.2.0", "version is 0.2.0, the package is"),
        ("charts/nvila/Chart.yaml", 'appVersion: "0.1.0"', 'appVersion: "0.0.9"', "appVersion is 0.0.9, the package"),
        ("CHANGELOG.md", "[Unreleased]", "[0.0.9] - 2026-01-01", "no section"),
        ("model/nvila/_version.py", "__version__", "version", "_version.py: nothing like"),
    ],
    ids=["chart", "app", "changelog", "package"],
)
def test_a_tree_of_several_versions_is_refused(tree: Path, file: str, old: str, new: str, said: str) -> None:
    path = tree / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(release.ReleaseError, match=said):
        release.checked_version(tree)


@pytest.mark.parametrize(
    ("file", "pattern", "named"),
    [
        ("docker/serve.Dockerfile", "@sha256:[0-9a-f]{64}", "docker/serve.Dockerfile: python:3.11-slim"),
        (
            "charts/nvila-platform/files/image-digests.yaml",
            "(?m)^docker.io/library/postgres.*$",
            "values.yaml: docker.io/library/postgres:17.5-bookworm",
        ),
    ],
)
def test_an_image_without_a_digest_is_refused(tree: Path, file: str, pattern: str, named: str) -> None:
    path = tree / file
    path.write_text(re.sub(pattern, "", path.read_text()))
    with pytest.raises(release.ReleaseError, match=rf"{named} is not pinned by digest; run: make pin-images"):
        release.checked_version(tree)


def test_a_final_release_records_its_charts(tree: Path) -> None:
    date_the_changelog(tree)
    record = tree / "charts" / "released.json"
    record.write_text(record.read_text().replace('"version": "0.1.0"', '"version": "0.0.9"'))
    git(tree, "commit", "--quiet", "-am", "Release")
    with pytest.raises(release.ReleaseError, match=r"charts/released.json is of 0.0.9; check and renew it"):
        release.checked_version(tree, final=True)
    # A rehearsal is before that.
    assert release.checked_version(tree) == "0.1.0"


def test_outside_of_git_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(release.ReleaseError, match="build from a git checkout"):
        release.commit_time(tmp_path)


def helm_binary() -> str:
    own = ROOT / ".tools" / "bin" / "helm"
    return str(own) if own.is_file() else shutil.which("helm") or ""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of this tree."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    if not helm_binary():
        pytest.skip("helm is not here: python scripts/tools.py")
    dest = tmp_path_factory.mktemp("release") / "dist"
    assert release.main(["--dest", str(dest)]) == 0
    return dest


def test_a_release_holds_the_wheel_the_charts_the_pipelines_and_their_checksums(dist: Path) -> None:
    found = {path.relative_to(dist).as_posix() for path in dist.rglob("*") if path.is_file()}
    charts = {f"{name}-0.1.0.tgz" for name in release.CHARTS}
    pipelines = {name for name in found if name.startswith("pipelines/")}
    assert found == {"nvila-0.1.0-py3-none-any.whl", "constraints.txt", *charts, *pipelines, "SHA256SUMS"}
    assert (dist / "constraints.txt").read_bytes() == (ROOT / "constraints.txt").read_bytes()
    assert "pipelines/lifecycle.yaml" in pipelines
    for name in pipelines:
        assert next(yaml.safe_load_all((dist / name).read_text()))["pipelineInfo"]["name"].startswith("nvila-")
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=dist, capture_output=True, check=False
    )
    assert done.returncode == 0
    for name in charts:
        show = [helm_binary(), "show", "chart", str(dist / name)]
        shown = subprocess.run(show, capture_output=True, text=True, check=True)
        assert yaml.safe_load(shown.stdout)["version"] == "0.1.0"
    assert len((dist / "SHA256SUMS").read_text().splitlines()) == len(found) - 1


def test_without_a_checkout_the_umbrella_is_unpacked_with_its_profiles(dist: Path, tmp_path: Path) -> None:
    # As docs/install.md says it: the pattern fits one of the four archives.
    unpack = f"tar -xzf {dist}/nvila-[0-9]*.tgz"
    assert unpack.replace(f"{dist}/", "") in (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    subprocess.run(unpack, shell=True, cwd=tmp_path, check=True, timeout=60)  # noqa: S602 - a pattern of the shell
    for profile in ("laptop", "gpu", "production"):
        values = tmp_path / "nvila" / f"values-{profile}.yaml"
        assert values.read_bytes() == (ROOT / "charts" / "nvila" / values.name).read_bytes()
        apis = ["--api-versions", "kueue.x-k8s.io/v1beta2", "--api-versions", "monitoring.coreos.com/v1"]
        command: list[str | Path] = [helm_binary(), "template", "nvila", tmp_path / "nvila", "-f", values, *apis]
        subprocess.run(command, check=True, capture_output=True, timeout=60)


def test_the_same_commit_gives_the_same_bytes_and_replaces_the_folder(dist: Path, tmp_path: Path) -> None:
    again = tmp_path / "dist"
    again.mkdir()
    (again / "old.txt").touch()
    # Archives hold whole seconds.
    time.sleep(1.1)
    release.build(ROOT, again, "0.1.0")
    assert (again / "SHA256SUMS").read_bytes() == (dist / "SHA256SUMS").read_bytes()
    assert not (again / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["dist"]


def test_a_builder_that_fails_leaves_the_last_release(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = tmp_path / "dist"
    dest.mkdir()
    (dest / "old.txt").touch()
    # The tree has no pyproject.toml.
    monkeypatch.setattr(release, "ROOT", tree)
    assert release.main(["--dest", str(dest)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert (dest / "old.txt").exists()


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment_and_checks_the_machine(dist: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    bin_ = tmp_path / "venv" / "bin"
    (wheel,) = dist.glob("*.whl")
    install: list[str | Path] = [bin_ / "pip", "install", "--quiet", "--constraint", dist / "constraints.txt", wheel]
    subprocess.run(install, check=True, timeout=600)
    version = subprocess.run([bin_ / "nvila", "version"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "0.1.0" in version.stdout
    doctor: list[str | Path] = [bin_ / "nvila", "doctor", "--json"]
    done = subprocess.run(doctor, capture_output=True, text=True, check=False, cwd=tmp_path)
    # The base package alone: every missing extra is named with the command that adds it.
    assert done.returncode == 1, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout.splitlines()[-1])["checks"]}
    assert checks["packages"]["status"] == "ok"
    assert checks["packages [train]"]["status"] == "missing"
    assert checks["packages [train]"]["fix"] == "pip install 'nvila[train]'"
