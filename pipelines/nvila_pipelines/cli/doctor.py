"""`nvila doctor`."""

from __future__ import annotations

import argparse
import sys

from nvila.errors import ConfigError
from nvila_pipelines.cli.output import emit, emit_json
from nvila_platform.settings import Settings

SUMMARY = "check whether this machine, or a cluster, is ready"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s [options]"
    parser.add_argument("--cluster", action="store_true", help="check the cluster of the kubeconfig instead")
    parser.add_argument(
        "--namespace",
        default="",
        metavar="NAME",
        help="with --cluster: where rights are asked for (default: the context's)",
    )


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Check and report; 1 when something is missing without which it cannot work.

    Raises:
        ConfigError: A namespace without `--cluster`.
    """
    from nvila_pipelines.cli.machine import MISSING, check_machine

    if args.namespace and not args.cluster:
        raise ConfigError("--namespace is of a cluster", "add --cluster")
    if args.cluster:
        from nvila_pipelines.cli.cluster_checks import check_cluster

        checks, purpose, ready = check_cluster(args.namespace), "the cluster", "ready: docs/install.md"
    else:
        checks, purpose, ready = check_machine(settings), "`nvila run`", "ready: nvila run"
    missing = [check.name for check in checks if check.status == MISSING]
    if args.json:
        emit_json({"ok": not missing, "checks": [check.to_dict() for check in checks]})
        return 1 if missing else 0
    color = sys.stdout.isatty()
    width = max(len(check.name) for check in checks)
    for check in checks:
        emit(f"{_painted(check.status, color)}  {check.name:<{width}}  {check.detail}")
        if check.fix:
            emit(f"{'':<7}  {'':<{width}}  fix: {check.fix}")
    emit(f"\nmissing for {purpose}: {', '.join(missing)}" if missing else f"\n{ready}")
    return 1 if missing else 0


def _painted(status: str, color: bool) -> str:
    codes = {"ok": "32", "warn": "33", "missing": "31"}
    return f"\033[{codes[status]}m{status:<7}\033[0m" if color else f"{status:<7}"
