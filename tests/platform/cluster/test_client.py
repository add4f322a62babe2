"""Jobs over real HTTP, against a server that keeps them in memory and fails as an API server does."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fake_kubernetes import Cluster, serving, write_kubeconfig

from nvila.errors import CapabilityError, ConfigError, InfrastructureError, NvilaError
from nvila_platform.cluster.client import ClusterClient
from nvila_platform.cluster.trainjob import TrainJobSpec, train_job

GROUP = "trainer.kubeflow.org"


def manifest(**changed: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"name": "curate-x", "image": "nvila:1", "command": ["nvila"], "num_nodes": 2}
    return train_job(TrainJobSpec(**(values | changed)))


def test_a_job_is_created_looked_at_and_deleted(kubernetes_cluster: Cluster) -> None:
    client = ClusterClient()
    created = client.submit(manifest())
    assert (created.name, created.namespace, created.state) == ("curate-x", "team", "Created")
    kept = kubernetes_cluster.get(GROUP, "trainjobs", "curate-x")
    assert kept is not None
    assert kept["spec"] == manifest()["spec"]
    assert client.status(manifest()).state == "Created"
    conditions = [
        {"type": "Suspended", "status": "False"},
        {"type": "Complete", "status": "True", "message": "all pods are done"},
    ]
    kubernetes_cluster.put(GROUP, "trainjobs", kept | {"status": {"conditions": conditions}})
    status = client.status(manifest())
    assert (status.state, status.message) == ("Complete", "all pods are done")
    client.delete(manifest())
    assert kubernetes_cluster.all(GROUP, "trainjobs") == []


def test_a_namespace_in_the_manifest_wins(kubernetes_cluster: Cluster) -> None:
    ClusterClient().submit(manifest(namespace="other"))
    assert len(kubernetes_cluster.all(GROUP, "trainjobs", "other")) == 1


def test_a_name_is_taken_once(kubernetes_cluster: Cluster) -> None:
    ClusterClient().submit(manifest())
    with pytest.raises(ConfigError, match="job 'curate-x' in namespace 'team' exists already"):
        ClusterClient().submit(manifest())


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (422, '{"message": "spec.x: unknown"}', ConfigError, "the cluster refuses .* spec.x: unknown"),
        (403, '{"message": "admission webhook \\"v\\" denied the request: no runtime"}', ConfigError, "no runtime"),
        (403, '{"message": "forbidden"}', CapabilityError, "this user may not touch .* forbidden"),
        (404, "404 page not found", CapabilityError, "the cluster has no TrainJobs"),
        (500, "", InfrastructureError, "with status 500"),
    ],
)
def test_what_the_cluster_says_is_typed(
    status: int, body: str, error: type[NvilaError], message: str, kubernetes_cluster: Cluster
) -> None:
    kubernetes_cluster.break_next("create", "trainjobs", status=status, body=body)
    with pytest.raises(error, match=message):
        ClusterClient().submit(manifest())


def test_a_job_that_is_not_there_is_named(kubernetes_cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match="there is no job 'curate-x' in namespace 'team'"):
        ClusterClient().status(manifest())


def test_a_cluster_that_does_not_answer_is_worth_another_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Cluster()) as server:
        write_kubeconfig(tmp_path / "config", server.address)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
    with pytest.raises(InfrastructureError, match="cannot be reached") as failed:
        ClusterClient().submit(manifest())
    assert failed.value.retryable


def forget_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = str(tmp_path / "none")
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", missing)
    monkeypatch.setattr("kubernetes.config.KUBE_CONFIG_DEFAULT_LOCATION", missing)
    monkeypatch.setenv("KUBECONFIG", missing)


def certificate(folder: Path) -> tuple[Path, Path]:
    """Write a certificate of 127.0.0.1 that vouches for itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cluster of a test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).add_extension(address, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.not_valid_before(now - datetime.timedelta(hours=1))
    signed = builder.not_valid_after(now + datetime.timedelta(hours=1)).sign(key, hashes.SHA256())
    encoding = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(signed.public_bytes(encoding))
    plain = serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    return folder / "ca.crt", folder / "key.pem"


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, Path]]:
    """Give what a pod has: no kubeconfig, the address of the API server, and the files of a service account."""
    forget_kubeconfig(tmp_path, monkeypatch)
    account = tmp_path / "serviceaccount"
    account.mkdir()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate(account))
    (account / "token").write_text("secret", encoding="utf-8")
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_TOKEN_FILENAME", str(account / "token"))
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_CERT_FILENAME", str(account / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    with serving(Cluster(), context) as server:
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
        yield server.cluster, account


@pytest.mark.parametrize(
    ("file", "asked", "namespace"),
    [("research\n", None, "research"), ("research", "other", "other"), (None, None, "default"), ("", None, "default")],
    ids=["of-the-pod", "of-the-manifest", "no-file", "empty-file"],
)
def test_in_a_pod_jobs_go_to_its_own_namespace(
    file: str | None, asked: str | None, namespace: str, pod: tuple[Cluster, Path]
) -> None:
    cluster, account = pod
    if file is not None:
        (account / "namespace").write_text(file, encoding="utf-8")
    created = ClusterClient().submit(manifest(namespace=asked))
    assert created.namespace == namespace
    assert len(cluster.all(GROUP, "trainjobs", namespace)) == 1


def test_without_a_cluster_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_kubeconfig(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="no cluster is known"):
        ClusterClient()
