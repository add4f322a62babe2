"""Whether a cluster has what a deployment needs, with the command that adds what it lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nvila.errors import CapabilityError
from nvila_pipelines.cli.cluster_checks import PARTS

if TYPE_CHECKING:
    from nvila_platform.cluster.inference_service import Revision
    from nvila_platform.cluster.resources import ResourceApi

_FIXES = {part.group: (part.name, part.fix) for part in PARTS} | {
    "serving.knative.dev": ("Knative Serving", "https://knative.dev/docs/install, or deploy with --mode standard"),
}
_WAYS_OUT = {
    "gateway.networking.k8s.io": ", or deploy without --policy: all traffic moves when the new pods are ready",
}


def check_cluster_for(api: ResourceApi, revision: Revision, *, splits: bool) -> None:
    """Look for the parts of a cluster that a revision needs.

    Args:
        api: The cluster.
        revision: What shall be deployed.
        splits: Whether traffic shall be split by weight.

    Raises:
        CapabilityError: One is missing; the hint adds it.
        InfrastructureError: The cluster cannot be reached.
    """
    needed = ["serving.kserve.io"]
    if revision.scaler == "keda":
        needed.append("keda.sh")
    if revision.mode == "Knative":
        needed.append("serving.knative.dev")
    elif splits:
        needed.append("gateway.networking.k8s.io")
    groups = api.groups()
    for group in needed:
        if group not in groups:
            name, fix = _FIXES[group]
            hint = fix + _WAYS_OUT.get(group, "")
            raise CapabilityError(f"this cluster has no {group}: {name} is not installed", hint)
