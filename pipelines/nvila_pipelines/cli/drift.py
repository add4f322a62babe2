"""`nvila drift`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nvila.errors import ConfigError, InfrastructureError, nearest
from nvila_pipelines.cli.options import whole_number
from nvila_pipelines.cli.output import emit, emit_json
from nvila_pipelines.cli.parser import WORDS
from nvila_platform.settings import Settings

SUMMARY = "compare what an endpoint sees and says with what its model was evaluated on"
SUBJECTS = ("reference", "report")
DEFAULT_LIMIT = 5000
_TIMEOUT_S = 15
_EPILOG = """\
examples:
  nvila drift reference mine.jsonl --out drift.json      describe the evaluation set, once
  nvila serve MODEL --drift drift.json                   watch a share of the traffic
  nvila drift report http://127.0.0.1:8080 --html drift.html

The server keeps counts of bins - sizes of images, brightness, lengths of texts - and nothing of any request. The number
is the population stability index: under 0.1 nothing happened, over 0.25 look into it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s reference DATA --out FILE [options]\n       %(prog)s report URL [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument(WORDS, nargs="*", metavar="SUBJECT PLACE", help="reference and data; or report and an address")
    made = parser.add_argument_group("reference")
    made.add_argument("--out", type=Path, metavar="FILE", help="file to write")
    made.add_argument("--media-dir", metavar="DIR", help="folder that the paths of images start from")
    made.add_argument("--mixtures", metavar="FILE", help="YAML file that names data sets; DATA is then names: a + b")
    made.add_argument(
        "--limit", type=whole_number, default=DEFAULT_LIMIT, metavar="N", help="records to read (default: %(default)s)"
    )
    shown = parser.add_argument_group("report")
    shown.add_argument("--html", type=Path, metavar="FILE", help="write a page with a picture of each feature")
    shown.add_argument("--api-key", metavar="KEY", help="of the server, when it asks for one (default: NVILA_API_KEY)")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code; 1 when a report finds drift."""
    subject, *places = args.words or [""]
    if subject not in SUBJECTS:
        problem = f"'{subject}' is no subject" if subject else "no subject is named"
        raise ConfigError(problem, nearest(subject, SUBJECTS) if subject else f"name one: {', '.join(SUBJECTS)}")
    if len(places) != 1:
        what = "data" if subject == "reference" else "address"
        raise ConfigError(f"{subject} takes one {what}, {len(places)} are named", "see nvila drift --help")
    return _reference(args, places[0], settings) if subject == "reference" else _report(args, places[0])


def _reference(args: argparse.Namespace, data: str, settings: Settings) -> int:
    if args.out is None:
        raise ConfigError("there is no file to write", "name it with --out")
    from nvila_pipelines.curation.spec import DataSpec, open_stream
    from nvila_pipelines.drift import describe
    from nvila_platform.telemetry import ProgressView

    stream = open_stream(DataSpec(data=data, mixtures=args.mixtures, media_dir=args.media_dir))
    with ProgressView(format=settings.log_format) as view:
        reference, skipped = describe(stream, args.limit, view.reporter("drift"))
    reference.write(args.out)
    facts = {"file": str(args.out), "samples": reference.samples, "skipped": skipped}
    if args.json:
        emit_json({**facts, "features": sorted(reference.features)})
    else:
        more = f", {skipped} left out" if skipped else ""
        emit(f"{args.out}: {reference.samples} samples of {data}{more}; {', '.join(reference.features)}")
    return 0


def _report(args: argparse.Namespace, url: str) -> int:
    from nvila_pipelines.drift import summary_lines
    from nvila_platform.drift.watch import ALARM, read_summary

    summary = read_summary(_ask(url, args.api_key))
    drifted = [name for name, found in summary["features"].items() if (found["psi"] or 0) >= ALARM]
    if args.html:
        from nvila_pipelines.report.drift_page import write_drift_page

        write_drift_page(url, summary, args.html)
    if args.json:
        emit_json({**summary, "drifted": drifted})
        return 1 if drifted else 0
    for line in summary_lines(summary):
        emit(line)
    if args.html:
        emit(f"page: {args.html}")
    return 1 if drifted else 0


def _ask(url: str, key: str | None) -> dict[str, Any]:
    import os
    import urllib.error
    import urllib.request

    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url} is no address of a server", "give http://HOST:PORT")
    address = f"{url.rstrip('/')}/drift"
    key = key or os.environ.get("NVILA_API_KEY")
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - the caller's own endpoint
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as e:
        e.close()  # it is the answer, whose connection is open
        fix = {
            401: "give a key with --api-key",
            404: "start the server with --drift FILE; make the file with nvila drift reference",
        }.get(e.code, "see the server's log")
        raise ConfigError(f"{address} answers {e.code}", fix) from e
    except (OSError, ValueError) as e:
        reason = str(getattr(e, "reason", e)).partition("\n")[0]
        raise InfrastructureError(
            f"{address} does not answer: {reason}", "is it running, and reachable from here?"
        ) from e
