"""What `nvila doctor --cluster` looks at: the cluster of the kubeconfig, and what this user may do there.

Nothing is changed. What may not be looked at is said so, and is no reason to fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nvila.errors import CapabilityError, ConfigError, NvilaError
from nvila_pipelines.cli.machine import MISSING, OK, WARN, Check, Status

OLDEST_KUBERNETES = (1, 30)
_TIMEOUT_S = 10
_GPU = "nvidia.com/gpu"
_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


@dataclass(frozen=True, slots=True)
class Part:
    """Something that a cluster has or lacks, known by the group of its resources.

    Args:
        name: What people call it.
        group: API group.
        use: What needs it.
        fix: Command that adds it.
        absent: What its absence is.
        resource: Of the group, `version/plural`, where others use the group too.
    """

    name: str
    group: str
    use: str
    fix: str
    absent: Status = WARN
    resource: str = ""


# Versions are those that the charts and manifests are checked against.
PARTS = (
    Part(
        "cert-manager",
        "cert-manager.io",
        "KServe",
        "helm install cert-manager oci://quay.io/jetstack/charts/cert-manager --version v1.18.2 -n cert-manager"
        " --create-namespace --set crds.enabled=true",
    ),
    Part(
        "KServe",
        "serving.kserve.io",
        "serving",
        "helm install kserve-crd oci://ghcr.io/kserve/charts/kserve-crd --version v0.21.0 -n kserve --create-namespace"
        " && helm install kserve oci://ghcr.io/kserve/charts/kserve-resources --version v0.21.0 -n kserve"
        " --set kserve.controller.deploymentMode=Standard",
        MISSING,
    ),
    Part(
        "Kubeflow Pipelines",
        "kubeflow.org",
        "pipelines",
        'kubectl apply -k "github.com/kubeflow/pipelines/manifests/kustomize/cluster-scoped-resources?ref=2.17.0"'
        ' && kubectl apply -k "github.com/kubeflow/pipelines/manifests/kustomize/env/platform-agnostic?ref=2.17.0"',
        MISSING,
        "v1beta1/scheduledworkflows",
    ),
    Part(
        "Kubeflow Trainer",
        "trainer.kubeflow.org",
        "training on several machines",
        "helm install kubeflow-trainer oci://ghcr.io/kubeflow/charts/kubeflow-trainer --version 2.3.0"
        " -n kubeflow-system --create-namespace",
    ),
    Part(
        "Kueue",
        "kueue.x-k8s.io",
        "queues of training jobs",
        "helm install kueue oci://registry.k8s.io/kueue/charts/kueue --version 0.14.4 -n kueue-system"
        " --create-namespace",
    ),
    Part(
        "KEDA",
        "keda.sh",
        "autoscaling by visual load and latency",
        "helm install keda keda --repo https://kedacore.github.io/charts --version 2.20.2 -n keda --create-namespace",
    ),
    Part(
        "Prometheus operator",
        "monitoring.coreos.com",
        "alerts and dashboards",
        # Version 0.93 of the operator. The profiles of the charts name this release in their labels.
        "helm install kube-prometheus-stack kube-prometheus-stack"
        " --repo https://prometheus-community.github.io/helm-charts --version 88.0.0 -n monitoring --create-namespace",
    ),
    Part(
        "Gateway API",
        "gateway.networking.k8s.io",
        "routes, and rollouts in steps",
        "kubectl apply -f"
        " https://github.com/kubernetes-sigs/gateway-api/releases/download/v1.4.1/standard-install.yaml",
    ),
)
# What the steps of the pipelines do, as the roles of charts/nvila-platform grant it.
RIGHTS = (
    ("create", "serving.kserve.io", "inferenceservices", "deploying"),
    ("create", "trainer.kubeflow.org", "trainjobs", "training on several machines"),
)


def check_cluster(namespace: str = "") -> list[Check]:
    """Look at the cluster of the current context.

    Args:
        namespace: Where rights are asked for; that of the context by default.
    """
    try:
        cluster = _Cluster(namespace)
    except NvilaError as e:
        return [Check(name="cluster", status=MISSING, detail=e.message, fix=e.hint)]
    found = [cluster.version()]
    if found[0].status == MISSING:
        return found
    found += cluster.parts()
    return [*found, cluster.gpus(), cluster.storage(), *cluster.rights()]


class _Cluster:
    def __init__(self, namespace: str) -> None:
        try:
            from kubernetes import client, config
            from kubernetes.config import ConfigException
        except ImportError as e:
            raise CapabilityError("the package kubernetes is not installed", "pip install 'nvila[pipelines]'") from e
        try:
            config.load_kube_config()
        except ConfigException as e:
            reason = str(e).strip().partition("\n")[0]
            raise ConfigError(f"no cluster is known: {reason}", "set KUBECONFIG, or write ~/.kube/config") from e
        _, active = config.list_kube_config_contexts()
        self._client = client
        self._context = str(active["name"])
        self._namespace = namespace or str(active["context"].get("namespace") or "default")

    def version(self) -> Check:
        try:
            said = self._client.VersionApi().get_code(_request_timeout=_TIMEOUT_S)
        except Exception as e:
            reason = str(getattr(e, "reason", None) or e).partition("\n")[0][:200]
            fix = f"kubectl --context {self._context} version"
            return Check(name="cluster", status=MISSING, detail=f"{self._context} does not answer: {reason}", fix=fix)
        version = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in (said.major, said.minor))
        detail = f"{self._context}, Kubernetes {said.major}.{said.minor}, namespace {self._namespace}"
        if version < OLDEST_KUBERNETES:
            oldest = ".".join(map(str, OLDEST_KUBERNETES))
            return Check(name="cluster", status=MISSING, detail=detail, fix=f"upgrade to Kubernetes {oldest} or newer")
        return Check(name="cluster", status=OK, detail=detail)

    def parts(self) -> Iterator[Check]:
        groups = {group.name for group in self._client.ApisApi().get_api_versions(_request_timeout=_TIMEOUT_S).groups}
        for part in PARTS:
            if part.group in groups and self._has(part):
                yield Check(name=part.name, status=OK, detail=part.group)
            else:
                detail = f"no {part.group}; needed for {part.use}"
                yield Check(name=part.name, status=part.absent, detail=detail, fix=part.fix)

    def _has(self, part: Part) -> bool:
        if not part.resource:
            return True
        version, _, plural = part.resource.partition("/")
        try:
            api = self._client.CustomObjectsApi()
            found = api.get_api_resources(part.group, version, _request_timeout=_TIMEOUT_S).resources
        except self._client.ApiException:
            return False
        return any(resource.name == plural for resource in found)

    def gpus(self) -> Check:
        fix = "for GPUs, install the NVIDIA GPU operator; the CPU profile needs none"

        def look() -> Check:
            nodes = self._client.CoreV1Api().list_node(_request_timeout=_TIMEOUT_S).items
            counts = [int((node.status.allocatable or {}).get(_GPU, 0)) for node in nodes]
            detail = f"{sum(counts)} on {sum(map(bool, counts))} of {len(nodes)} nodes"
            return Check(name="GPUs", status=OK if sum(counts) else WARN, detail=detail, fix="" if sum(counts) else fix)

        return _allowed("GPUs", "nodes", look)

    def storage(self) -> Check:
        fix = 'kubectl annotate storageclass NAME storageclass.kubernetes.io/is-default-class="true"'

        def look() -> Check:
            classes = self._client.StorageV1Api().list_storage_class(_request_timeout=_TIMEOUT_S).items
            default = [
                one.metadata.name for one in classes if (one.metadata.annotations or {}).get(_DEFAULT_CLASS) == "true"
            ]
            if default:
                return Check(name="storage", status=OK, detail=f"{default[0]} is the default class")
            names = ", ".join(one.metadata.name for one in classes) or "none"
            return Check(name="storage", status=WARN, detail=f"no default class among: {names}", fix=fix)

        return _allowed("storage", "storage classes", look)

    def rights(self) -> Iterator[Check]:
        for verb, group, resource, use in RIGHTS:
            asked = self._client.V1ResourceAttributes(
                namespace=self._namespace, verb=verb, group=group, resource=resource
            )
            review = self._client.V1SelfSubjectAccessReview(
                spec=self._client.V1SelfSubjectAccessReviewSpec(resource_attributes=asked)
            )
            answer = self._client.AuthorizationV1Api().create_self_subject_access_review(
                review, _request_timeout=_TIMEOUT_S
            )
            name, what = f"may {verb} {resource}", f"in namespace {self._namespace}"
            if answer.status.allowed:
                yield Check(name=name, status=OK, detail=what)
            else:
                fix = "install charts/nvila-platform, whose roles grant it to pipelines; or ask for it"
                yield Check(name=name, status=WARN, detail=f"not {what}; needed for {use}", fix=fix)


def _allowed(name: str, what: str, look: Callable[[], Check]) -> Check:
    """Look at something that belongs to the whole cluster, which few users may."""
    try:
        return look()
    except Exception as e:
        status: Any = getattr(e, "status", "")
        reason = "this user may not look at" if status in (401, 403) else "the cluster does not show"
        return Check(name=name, status=WARN, detail=f"{reason} {what}", fix="ask an administrator to run this")
