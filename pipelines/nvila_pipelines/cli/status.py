"""`nvila status`: what serves on a cluster."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from nvila_pipelines.cli.output import emit, emit_json
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila_pipelines.deployment.status import EndpointStatus
    from nvila_platform.cluster.resources import ResourceApi

SUMMARY = "show endpoints: revisions, traffic, replicas, readiness, model versions"
_EPILOG = """\
examples:
  nvila status                       every endpoint of the namespace
  nvila status nvila --watch         until it is ready and no rollout is under way
  nvila status nvila --json
"""
# Also without an event of the endpoint: a rollout ends in its Lease, which is not watched.
_LOOK_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s [NAME] [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="of an endpoint (default: all)")
    parser.add_argument("--namespace", default="", metavar="NAME", help="where (default: the kubeconfig's context's)")
    parser.add_argument("--watch", action="store_true", help="show every change until nothing is under way")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    from nvila_pipelines.deployment.status import read_status
    from nvila_platform.cluster.resources import ResourceApi

    del settings  # what serves is asked of the cluster alone
    with closing(ResourceApi(args.namespace)) as api:
        shown: list[EndpointStatus] | None = None
        for _ in _looks(api, args.name) if args.watch else (None,):
            found = read_status(api, args.name)
            if found != shown:
                _show(found, api.namespace, as_json=args.json)
                shown = found
            if all(one.rests for one in found):
                break
    return 0


def _looks(api: ResourceApi, name: str) -> Iterator[None]:
    """Yield whenever something may have changed."""
    from nvila_platform.cluster.resources import INFERENCE_SERVICES

    while True:
        if not name:
            yield
            time.sleep(_LOOK_S)
            continue
        for _ in api.watch(INFERENCE_SERVICES, name, timeout_s=_LOOK_S):
            yield


def _show(found: list[EndpointStatus], namespace: str, *, as_json: bool) -> None:
    from nvila_pipelines.deployment.status import status_lines

    if as_json:
        emit_json({"namespace": namespace, "endpoints": [one.to_dict() for one in found]})
    elif not found:
        emit(f"nothing is deployed in namespace {namespace}: nvila deploy MODEL")
    else:
        for line in status_lines(found):
            emit(line)
