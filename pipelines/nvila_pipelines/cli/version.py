"""`nvila version`."""

from __future__ import annotations

import argparse
import platform

from nvila import __version__
from nvila_pipelines.cli.output import emit, emit_json
from nvila_platform.artifacts import code_version
from nvila_platform.settings import Settings

SUMMARY = "show the version and the digest of the code"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s [options]"


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    facts = {"version": __version__, "code_version": code_version(), "python": platform.python_version()}
    if args.json:
        emit_json(facts)
    else:
        emit(f"nvila {facts['version']} (code {facts['code_version']}, Python {facts['python']})")
    return 0
