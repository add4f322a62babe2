"""`nvila doctor`."""

from __future__ import annotations

import argparse
import sys

from nvila_pipelines.cli.output import emit, emit_json
from nvila_platform.settings import Settings

SUMMARY = "check whether this machine is ready"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s [options]"


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Check and report; 1 when something that `nvila run` needs is missing."""
    from nvila_pipelines.cli.machine import MISSING, check_machine

    checks = check_machine(settings)
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
    emit(f"\nmissing for `nvila run`: {', '.join(missing)}" if missing else "\nready: nvila run")
    return 1 if missing else 0


def _painted(status: str, color: bool) -> str:
    codes = {"ok": "32", "warn": "33", "missing": "31"}
    return f"\033[{codes[status]}m{status:<7}\033[0m" if color else f"{status:<7}"
