"""What the code asks of the API server is what the roles of charts/nvila-platform grant, no less and no more."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from tests.pipelines.deployment.conftest import World

ROOT = Path(__file__).resolve().parents[3]
Nvila = Callable[..., Any]


@pytest.fixture(scope="module")
def granted() -> set[tuple[str, str, str]]:
    """Verb, group and resource of every rule of the role for deploying, as helm renders it."""
    fetched = ROOT / ".tools" / "bin" / "helm"
    helm = str(fetched) if fetched.is_file() else shutil.which("helm")
    if helm is None:
        pytest.skip("helm 4 is not here: python scripts/tools.py")
    only = "templates/pipelines/rbac.yaml"
    command = [helm, "template", "demo", str(ROOT / "charts" / "nvila-platform"), "--show-only", only]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    roles = [one for one in yaml.safe_load_all(done.stdout) if one and one["kind"] == "Role"]
    (role,) = [one for one in roles if one["metadata"]["name"].endswith("-inferenceservices")]
    return {
        (verb, group, resource)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def test_the_roles_grant_what_is_called_and_nothing_else(
    deployed: World, nvila: Nvila, canary: Nvila, granted: set[tuple[str, str, str]]
) -> None:
    deployed.kserve.delay_s = 0.2
    assert canary("--steps", "10,100").code == 0
    assert nvila("deploy", "eye/1", "image.tag=1.0.1", "--timeout", 5).code == 0
    assert nvila("rollback", "eye", "--timeout", 5).code == 0
    assert nvila("status").code == 0
    assert nvila("status", "eye", "--watch").code == 0
    deployed.users.of["-v2-"] = {"failed": 50}
    assert canary("--steps", "10", "image.tag=1.0.2").code == 1
    called = set(deployed.cluster.calls)
    assert called - granted == set(), "called and not granted"
    assert granted - called == set(), "granted and not called"
