"""What a job that did not come to its end amounts to: a typed error with the reason and what to do."""

from __future__ import annotations

import signal
from pathlib import Path

from nvila.errors import ConfigError, InfrastructureError, NvilaError, ResourceError
from nvila_platform.cluster.pods import Finding
from nvila_platform.launch.job_progress import Cause
from nvila_platform.launch.local import log_tail
from nvila_platform.launch.outcome import RAISED, killed_error, left_error

_RESUME = "run the same command again: it goes on from the last checkpoint"
_SIGNALLED = 128


def job_failure(cause: Cause, job: str, error_path: Path, log_path: Path, start: int) -> NvilaError:
    """Return the error of a job.

    The module's own typed error comes first. Then what Kubernetes did to a pod, because torchrun on the other nodes
    only sees its peers go away. Then what torchrun saw of its workers.

    Args:
        cause: What is known.
        job: Its name.
        error_path: Where its processes leave an error.
        log_path: Log of all nodes.
        start: Where this job's part of it begins.
    """
    left, how = left_error(error_path) or (None, "")
    tail = log_tail(log_path, start)
    if left is not None and how == RAISED:
        return left
    if cause.deleted:
        return NvilaError(f"job {job} was deleted while it ran", f"{_RESUME}; log: {log_path}")
    finding = cause.finding
    if finding is not None and finding.kind != "exit":
        return _by_kind(finding, cause)
    if left is not None:
        return type(left)(left.message, f"{left.hint}; log: {log_path}{tail}")
    if finding is None:
        return NvilaError(
            f"job {job} failed: {cause.message}", f"kubectl describe trainjob {job}; log: {log_path}{tail}"
        )
    if finding.code > _SIGNALLED and finding.code - _SIGNALLED in (signal.SIGKILL, signal.SIGTERM):
        place = finding.text.partition(" ended")[0]
        killed = killed_error(place, finding.code - _SIGNALLED)
        return InfrastructureError(killed.message, f"{killed.hint}; log: {log_path}{tail}")
    if finding.code == InfrastructureError.exit_code:
        return InfrastructureError(finding.text, f"{_RESUME}; log: {log_path}{tail}")
    return NvilaError(finding.text, f"log: {log_path}{tail}")


def _by_kind(finding: Finding, cause: Cause) -> NvilaError:
    text = finding.text
    if finding.kind == "memory":
        limit = f" of {cause.memory}" if cause.memory else ""
        return ResourceError(
            f"{text}{limit}", "give nodes more memory in the profile, use more nodes, or smaller micro-batches"
        )
    if finding.kind == "lost":
        return InfrastructureError(text, _RESUME)
    if finding.kind == "image":
        return ConfigError(text, "check the image's name and tag, and the pull secret of the nodes' service account")
    if finding.kind == "start":
        return ConfigError(text, "check the secrets, config maps and claims that the profile names")
    if finding.kind == "quota":
        return InfrastructureError(text, "ask for more quota, use fewer nodes, or run it again later")
    return InfrastructureError(text, "use fewer nodes or another gpu_type or node_selector, or run it again later")
