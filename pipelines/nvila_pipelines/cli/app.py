"""The parser of the whole command and the way from a command line to an exit code.

Nothing heavy is imported here or at the top of a verb's module: `--help` answers before torch could even be found.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from nvila_pipelines.cli import (
    adapters,
    bench,
    compare,
    convert,
    curate,
    deploy,
    doctor,
    drift,
    evaluate,
    gate,
    inspect,
    lineage,
    pipeline,
    plan,
    quantize,
    rollback,
    run,
    serve,
    status,
    store,
    sweep,
    train,
    tune,
    ui,
    version,
)
from nvila_pipelines.cli.failures import guarded
from nvila_pipelines.cli.options import add_common_arguments
from nvila_pipelines.cli.parser import Parser
from nvila_platform.launch.stopping import terminable
from nvila_platform.settings import Settings
from nvila_platform.telemetry import configure_logging

DESCRIPTION = (
    "NVILA on one machine: curate, train, tune, quantize, evaluate, register and serve a visual language model."
)
EPILOG = """\
examples:
  nvila run                              the whole lifecycle with the recipe quickstart
  nvila run --fast --serve               a short one that leaves the endpoint up
  nvila train seed=1 train.precision=bf16
  nvila tune MODEL my-data/
  nvila serve models:/nvila@champion
  nvila doctor                           is this machine ready?

exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 75 try again, 130 interrupted
"""


class Verb(Protocol):
    """What a verb's module offers."""

    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's own arguments."""

    def run(self, args: argparse.Namespace, settings: Settings) -> int:
        """Do the work and return the exit code."""


# In the order of a model's life; the help lists them so.
VERBS: dict[str, Verb] = {
    "run": run,
    "curate": curate,
    "train": train,
    "plan": plan,
    "tune": tune,
    "adapters": adapters,
    "quantize": quantize,
    "evaluate": evaluate,
    "compare": compare,
    "gate": gate,
    "sweep": sweep,
    "bench": bench,
    "convert": convert,
    "inspect": inspect,
    "lineage": lineage,
    "serve": serve,
    "deploy": deploy,
    "rollback": rollback,
    "status": status,
    "drift": drift,
    "pipeline": pipeline,
    "store": store,
    "ui": ui,
    "doctor": doctor,
    "version": version,
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command with all its verbs."""
    parser = Parser(
        prog="nvila",
        description=DESCRIPTION,
        epilog=EPILOG,
        usage="%(prog)s VERB [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs", prog="nvila", parser_class=Parser)
    for name, verb in VERBS.items():
        summary = verb.SUMMARY
        verb_parser = verbs.add_parser(name, help=summary, description=f"{summary[:1].upper()}{summary[1:]}.")
        verb.add_arguments(verb_parser)
        add_common_arguments(verb_parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        The exit code. Errors have been written to standard error.
    """
    args = argparse.Namespace(debug=False, json=False, workspace=None)
    return guarded(lambda: _run(argv, args), args)


def _run(argv: Sequence[str] | None, args: argparse.Namespace) -> int:
    parser = build_parser()
    try:
        parser.parse_args(argv, namespace=args)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    if args.verb is None:
        parser.print_help()
        return 2
    settings = Settings.load(args.workspace)
    if args.log_format is not None:
        settings = replace(settings, log_format=args.log_format)
    configure_logging(settings.log_format)
    with terminable():
        return VERBS[args.verb].run(args, settings)
