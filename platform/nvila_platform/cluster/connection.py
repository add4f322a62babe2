"""Finding the cluster: that of the kubeconfig, or of the pod that this runs in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvila.errors import CapabilityError, ConfigError

_DEFAULT_NAMESPACE = "default"


def connect(namespace: str = "") -> tuple[Any, str]:
    """Return the API client of the cluster and the namespace to work in.

    Args:
        namespace: Wins over that of the kubeconfig's context or of this pod.

    Raises:
        ConfigError: There is no kubeconfig, and this is no pod.
        CapabilityError: The package kubernetes is not installed.
    """
    try:
        from kubernetes import client, config
        from kubernetes.config import ConfigException
    except ImportError as e:
        raise CapabilityError("the package kubernetes is not installed", "pip install 'nvila[pipelines]'") from e
    settings = client.Configuration()
    try:
        try:
            config.load_kube_config(client_configuration=settings)
            found = _context_namespace(config)
        except ConfigException:
            config.load_incluster_config(client_configuration=settings)
            found = _pod_namespace()
    except ConfigException as e:
        reason = str(e).strip().partition("\n")[0][:300]
        raise ConfigError(f"no cluster is known: {reason}", "set KUBECONFIG, or write ~/.kube/config") from e
    return client.ApiClient(settings), namespace or found


def in_pod() -> bool:
    """Whether this process runs in a pod of a cluster."""
    from kubernetes.config import incluster_config

    return Path(incluster_config.SERVICE_TOKEN_FILENAME).is_file()


def _context_namespace(config: Any) -> str:
    """Return the namespace of the kubeconfig's current context."""
    _, active = config.list_kube_config_contexts()
    return str(active["context"].get("namespace") or _DEFAULT_NAMESPACE)


def _pod_namespace() -> str:
    """Return the namespace of the pod that this runs in, which its service account may use."""
    from kubernetes.config import incluster_config

    try:
        found = Path(incluster_config.SERVICE_TOKEN_FILENAME).with_name("namespace").read_text(encoding="utf-8")
    except OSError:
        return _DEFAULT_NAMESPACE
    return found.strip() or _DEFAULT_NAMESPACE
