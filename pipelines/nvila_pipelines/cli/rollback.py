"""`nvila rollback`: bring back what served an endpoint before."""

from __future__ import annotations

import argparse

from nvila_pipelines.cli.deploy import notice, show
from nvila_pipelines.cli.options import whole_number
from nvila_platform.settings import Settings

SUMMARY = "stop a rollout, or bring back what served an endpoint before"
_EPILOG = """\
A rollout under way is undone, also one that somebody else started; they notice and stop. Without one, the pods of the
previous revision are started, and take all traffic once they are ready; the alias champion goes back with them.

examples:
  nvila rollback nvila
  nvila rollback eyes --namespace models --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s NAME [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("name", metavar="NAME", help="of the endpoint, as nvila status lists it")
    parser.add_argument("--namespace", default="", metavar="NAME", help="where (default: the kubeconfig's context's)")
    parser.add_argument(
        "--timeout", type=whole_number, default=900, metavar="S", help="longest wait for pods (default: 900)"
    )


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    from nvila_pipelines.deployment.run import go_back

    done = go_back(args.name, args.namespace, float(args.timeout), "champion", settings, notice)
    show(done, as_json=args.json)
    return 0
