"""The real helm, charts rendered by it, and strict validation of what comes out."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from tests.charts.built_in_validation import BuiltInSchemas

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".tools" / "bin"
CRDS = ROOT.parent / "shared" / "crds"
KUBERNETES = ("1.30", "1.33", "1.34", "1.35", "1.36", "1.37")

Document = dict[str, Any]


@dataclass(frozen=True)
class Helm:
    """The helm binary, kept away from the caller's kubeconfig and caches."""

    binary: Path
    home: Path

    def run(self, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run helm with arguments and return what it said, whether it failed or not."""
        places = {f"HELM_{name}_HOME": str(self.home / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
        return subprocess.run(
            [str(self.binary), *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={"PATH": os.environ["PATH"], "HOME": str(self.home), "KUBECONFIG": os.devnull, **places},
        )

    def template(
        self,
        chart: Path,
        values: Mapping[str, Any] | None = None,
        release: str = "demo",
        extra: tuple[str, ...] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Render a chart with values, as `helm template` does."""
        text = yaml.safe_dump(dict(values or {}))
        return self.run("template", release, chart, "--namespace", "models", "--values", "-", *extra, stdin=text)


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Helm 4: the fetched one, the one on PATH, or fetched now."""
    home = tmp_path_factory.mktemp("helm")
    on_path = shutil.which("helm")
    for candidate in (TOOLS / "helm", Path(on_path) if on_path else None):
        if candidate and candidate.is_file() and _is_helm_4(found := Helm(candidate, home)):
            return found
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "tools.py")], capture_output=True, text=True, check=False, timeout=150
    )
    if done.returncode:
        pytest.skip(f"helm 4 is not here and could not be fetched: {done.stderr.strip()}")
    return Helm(TOOLS / "helm", home)


def _is_helm_4(helm: Helm) -> bool:
    return helm.run("version", "--short").stdout.startswith("v4.")


@pytest.fixture(scope="session")
def render(helm: Helm) -> Callable[..., list[Document]]:
    """Render a chart and return its documents; the same render is made once a session."""
    known: dict[str, list[Document]] = {}

    def documents(
        chart: Path,
        values: Mapping[str, Any] | None = None,
        release: str = "demo",
        extra: tuple[str, ...] = (),
    ) -> list[Document]:
        key = repr((chart, values, release, extra))
        if key not in known:
            done = helm.template(chart, values, release, extra)
            assert done.returncode == 0, done.stderr
            known[key] = [document for document in yaml.safe_load_all(done.stdout) if document]
        return known[key]

    return documents


@pytest.fixture(scope="session")
def built_in() -> BuiltInSchemas:
    """Schemas of Kubernetes' own resources, of the oldest version that the charts admit and the current ones."""
    schemas: BuiltInSchemas = _beside("built_in_validation").BuiltInSchemas(KUBERNETES)
    return schemas


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered first: dataclasses look their own module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
