"""Fixtures and switches that every test folder shares."""

from __future__ import annotations

import difflib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.charts.crd_validation import CrdSchemas

GOLDEN = Path(__file__).parent / "golden"
CRDS = Path(__file__).resolve().parents[2] / "shared" / "crds"
GoldenCheck = Callable[[str, str], None]


def pytest_configure() -> None:
    """Undo an ignored SIGINT, which shells give to background jobs and every child process inherits."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Workers share the cores; threads of several fighting for them are slower than one thread each.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nvila")
    group.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what the code says now")
    group.addoption("--slow", action="store_true", help="also run tests longer than ten seconds")
    group.addoption("--cluster", action="store_true", help="also run tests that need a Kubernetes cluster")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--update-golden"):
        others = [item for item in items if "golden" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    reasons = _skip_reasons(config, {mark.name for item in items for mark in item.iter_markers()})
    for item in items:
        for name, reason in reasons.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def _skip_reasons(config: pytest.Config, used: set[str]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    if "gpu" in used and not _has_gpu():
        reasons["gpu"] = "needs a CUDA device, this machine has none"
    if not config.getoption("--slow"):
        reasons["slow"] = "longer than ten seconds: run with --slow, or make test-all"
    if not config.getoption("--cluster"):
        reasons["cluster"] = "needs a Kubernetes cluster: run with --cluster and KUBECONFIG set"
    elif not os.environ.get("KUBECONFIG"):
        reasons["cluster"] = "--cluster was given but KUBECONFIG is not set"
    return reasons


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> GoldenCheck:
    """Compare text with tests/golden/<name>; `--update-golden` writes the file instead.

    Scrub versions, times and paths before the call: a golden file holds only what a reader would want to review.
    """
    update = bool(request.config.getoption("--update-golden"))

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"tests/golden/{name} does not exist; write it with: make golden", pytrace=False)
        expected = path.read_text(encoding="utf-8")
        if text != expected:
            lines = difflib.unified_diff(
                expected.splitlines(), text.splitlines(), f"tests/golden/{name}", "what the code says now", lineterm=""
            )
            diff = "\n".join(lines) or "(only the line endings or the last newline differ)"
            pytest.fail(f"{diff}\n\nIf this change is meant, accept it with: make golden", pytrace=False)

    return check


@pytest.fixture(scope="session")
def crds() -> CrdSchemas:
    """Definitions of the custom resources that charts and manifests make."""
    if not CRDS.is_dir():
        pytest.skip(f"the custom resource definitions are not here: {CRDS}")
    spec = importlib.util.spec_from_file_location(
        "crd_validation", Path(__file__).parent / "charts" / "crd_validation.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered first: dataclasses look their own module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    schemas: CrdSchemas = module.CrdSchemas(CRDS)
    return schemas
