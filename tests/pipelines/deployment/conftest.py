"""A cluster, its users and a registry with two versions, for the command in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from nvila_platform.registration import register_model
from nvila_platform.registry import set_alias
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef

if TYPE_CHECKING:
    from tests.api_server import Cluster, Document
    from tests.charts.crd_validation import CrdSchemas
    from tests.kserve_controller import Kserve, Users

POLICY = "live: {max_error_rate: 0.05, ttft_p95_ms: 500, min_requests: 20}"


@dataclass
class World:
    """Everything around one deployment."""

    cluster: Cluster
    kserve: Kserve
    users: Users
    prometheus: str
    kubeconfig: Path
    settings: Settings

    def service(self, name: str = "eye") -> Document:
        found = self.cluster.named("inferenceservices", name)
        assert found is not None
        return found

    def predictor(self) -> Document:
        found: Document = self.service()["spec"]["predictor"]
        return found

    def lease(self) -> Document:
        found = self.cluster.named("leases", "eye-rollout")
        assert found is not None
        return found

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.lease()["metadata"]["annotations"]["nvila.dev/rollout"])
        return found

    def runtimes(self) -> set[str]:
        return {name for _, kind, name in self.cluster.resources if kind == "servingruntimes"}

    def aliases(self) -> dict[str, int]:
        from nvila_platform.mlflow_backend import connect

        found = connect(self.settings).get_registered_model("eye").aliases
        return {name: int(version) for name, version in found.items()}

    def weights(self) -> list[int]:
        """What shares canaries had, in order."""
        shares = [spec["canary"][0]["trafficPercent"] if spec.get("canary") else -1 for spec in self.kserve.seen]
        return [share for number, share in enumerate(shares) if not number or shares[number - 1] != share]


def artifact(number: int, uri: str = "") -> ArtifactRef:
    text = f"{number:064x}"
    return ArtifactRef(step="quantize", key=text, digest=text, uri=uri or f"s3://nvila/artifacts/quantize/{number}")


def add_version(settings: Settings, number: int, uri: str = "", **tags: str) -> None:
    plain = {"nvila.gate.state": "passed"} | {f"nvila.{name.replace('__', '.')}": value for name, value in tags.items()}
    version = register_model(settings, "eye", artifact(number, uri), None, plain)
    assert version.version == number


@pytest.fixture(scope="session")
def registry_file(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with versions 1 and 2 of `eye`; copied for every test, because MLflow is slow to fill."""
    folder = tmp_path_factory.mktemp("registry")
    (folder / "mlflow.db").write_bytes(migrated_database.read_bytes())
    settings = Settings.load(folder, {})
    add_version(settings, 1)
    add_version(settings, 2)
    set_alias(settings, "eye", "candidate", 2)
    return folder / "mlflow.db"


@pytest.fixture
def world(
    api_server: ModuleType,
    kserve_controller: ModuleType,
    crds: CrdSchemas,
    registry_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    """A cluster with KServe and the Gateway API, users who are content, and the registry."""
    kserve, users = kserve_controller.Kserve(), kserve_controller.Users()
    cluster = api_server.Cluster(errors=crds.errors, on_write=[kserve])
    workspace = tmp_path / "nvila-workspace"
    workspace.mkdir()
    (workspace / "mlflow.db").write_bytes(registry_file.read_bytes())
    (tmp_path / "policy.yaml").write_text(POLICY)
    config = tmp_path / "kubeconfig"
    with api_server.serving(cluster) as address, kserve_controller.prometheus(users) as metrics:
        config.write_text(yaml.safe_dump(api_server.kubeconfig(address)))
        monkeypatch.setenv("KUBECONFIG", str(config))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(config))
        monkeypatch.setenv("NVILA_PROMETHEUS_URL", metrics)
        monkeypatch.setattr("nvila_platform.cluster.resources.time.sleep", lambda seconds: None)
        yield World(cluster, kserve, users, metrics, config, Settings.load(workspace, {}))
        kserve.close()


@pytest.fixture
def deployed(world: World, nvila: Callable[..., Any]) -> World:
    """Version 1 serves."""
    done = nvila("deploy", "eye/1", "--timeout", 5)
    assert done.code == 0, done.err
    return world


@pytest.fixture
def canary(nvila: Callable[..., Any]) -> Callable[..., Any]:
    """Roll version 2 out by a policy, in a hurry."""

    def run(*more: object) -> Any:
        return nvila("deploy", "eye@candidate", "--policy", "policy.yaml", "--interval", 1, "--timeout", 3, *more)

    return run
