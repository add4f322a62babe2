"""The import contracts hold for the code, and each of them catches what it is there for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SKELETON = [
    "nvila",
    "nvila_platform",
    "nvila_platform/cluster",
    "nvila_platform/serving",
    "nvila_pipelines",
    "nvila_pipelines/components",
    "nvila_pipelines/graphs",
]


def lint_imports(cwd: Path, import_path: str = "") -> subprocess.CompletedProcess[str]:
    command = [
        str(Path(sys.executable).parent / "lint-imports"),
        "--config",
        str(ROOT / "pyproject.toml"),
        "--no-cache",
    ]
    env = {**os.environ, "PYTHONPATH": import_path, "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def skeleton(tmp_path: Path) -> Path:
    for folder in SKELETON:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    return tmp_path


def test_import_contracts_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("nvila_platform/store.py", "import nvila.other"),
        ("nvila_platform/serving/routes.py", "import fastapi"),
        ("nvila_pipelines/graphs/lifecycle.py", "import kfp"),
    ],
    ids=["platform on model", "web framework in serving", "kfp in graphs"],
)
def test_allowed_import_passes(tmp_path: Path, file: str, line: str) -> None:
    root = skeleton(tmp_path)
    (root / "nvila/other.py").touch()
    (root / file).write_text(line + "\n")
    done = lint_imports(root, str(root))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("nvila/bad.py", "import nvila_platform", "never upwards"),
        ("nvila_platform/bad.py", "import nvila_pipelines", "never upwards"),
        ("nvila/bad.py", "import mlflow", "the model knows no cluster"),
        ("nvila/bad.py", "def f():\n    import kubernetes", "the model knows no cluster"),
        ("nvila_pipelines/graphs/bad.py", "import torch", "compile where torch is not installed"),
        ("nvila_platform/cluster/bad.py", "import torch", "compile where torch is not installed"),
        ("nvila_pipelines/components/bad.py", "import transformers", "compile where torch is not installed"),
        ("nvila_platform/bad.py", "import fastapi", "only nvila_platform.serving"),
        ("nvila_pipelines/bad.py", "import kserve", "only nvila_platform.serving"),
    ],
)
def test_forbidden_import_is_caught(tmp_path: Path, file: str, line: str, contract: str) -> None:
    root = skeleton(tmp_path)
    (root / file).write_text(line + "\n")
    done = lint_imports(root, str(root))
    broken = [text for text in done.stdout.splitlines() if text.endswith("BROKEN")]
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(broken) == 1, done.stdout
    assert contract in broken[0]
