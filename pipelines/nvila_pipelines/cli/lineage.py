"""`nvila lineage`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nvila_pipelines.cli.output import emit, emit_json
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila_platform.origin import Origin

SUMMARY = "walk from an endpoint, model or artifact back to the data it came from"
_EPILOG = """\
examples:
  nvila lineage http://127.0.0.1:8080          what answers there, and where it came from
  nvila lineage models:/nvila@champion --verify
  nvila lineage models:/nvila/3 --html lineage.html

With --verify every artifact is read again and each file compared with its digest: exit code 1 when one is damaged or
gone. What came from outside, such as a downloaded data set, is named; there is nothing to compare it with.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s REF [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("reference", metavar="REF", help="http://..., models:/NAME@ALIAS, a digest, or a folder")
    parser.add_argument("--verify", action="store_true", help="read every artifact again and check its digests")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the graph as a page that needs no network")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Walk, show and, when asked, verify; 1 when something is damaged."""
    from nvila_platform.lineage import EXTERNAL
    from nvila_platform.origin import find_origin, verify_all
    from nvila_platform.store import open_store
    from nvila_platform.telemetry import ProgressView

    origin = find_origin(settings, args.reference)
    found: dict[str, str] | None = None
    damaged: list[str] = []
    if args.verify:
        with ProgressView(format=settings.log_format) as view:
            checked = list(verify_all(open_store(settings), origin.artifacts(), view.reporter("lineage")))
        found = {node.digest: problem for node, problem in checked}
        damaged = [node.digest for node, problem in checked if problem and node.step != EXTERNAL]
    if args.html:
        from nvila_pipelines.report.lineage_page import write_lineage_page

        write_lineage_page(origin, found, args.html)
    if args.json:
        emit_json(origin.to_dict() | ({} if found is None else {"verified": found, "damaged": damaged}))
    else:
        for line in _lines(origin, found):
            emit(line)
        if args.html:
            emit(f"\npage: {args.html}")
        if found is not None:
            emit(f"\ndamaged or gone: {len(damaged)} of {len(found)}" if damaged else "\nevery digest is right")
    return 1 if damaged else 0


def _lines(origin: Origin, found: dict[str, str] | None) -> Iterator[str]:
    from nvila_pipelines.report.lineage_page import facts

    rows = facts(origin)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        yield f"{name:<{width}}  {value}"
    if rows:
        yield ""
    for node, line in zip(origin.root.walk(), origin.root.lines(), strict=True):
        yield line if found is None else f"{line}  [{found[node.digest] or 'ok'}]"
