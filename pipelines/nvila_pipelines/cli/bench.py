"""`nvila bench`: comparisons on one's own model and data."""

from __future__ import annotations

import argparse

from nvila.errors import ConfigError, nearest
from nvila_pipelines.cli.options import prepare_workspace, whole_number
from nvila_pipelines.cli.output import emit, emit_json
from nvila_pipelines.cli.parser import WORDS
from nvila_pipelines.cli.quantize import SCHEMES, add_data_arguments, make_request
from nvila_platform.settings import Settings

SUMMARY = "compare ways to run a model on your own data"
SUBJECTS = ("quantize",)
EPILOG = """\
examples:
  nvila bench quantize MODEL --data mine.jsonl       every scheme: size, accuracy, errors, speed against the wide model

Speeds are measured in turns with the wide model; a ratio stands with its range over repeats.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s quantize MODEL --data DATA [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        WORDS, nargs="*", metavar="SUBJECT MODEL", help="quantize; then a model folder or models:/NAME@ALIAS"
    )
    schemes = parser.add_argument_group("schemes", "What is compared beside int8 and fp8.")
    schemes.add_argument("--vision", choices=SCHEMES, help="of the vision tower (default: w8a8)")
    schemes.add_argument("--language", choices=SCHEMES, help="of the language model (default: w4a16)")
    schemes.add_argument(
        "--group-size", type=whole_number, metavar="N", help="inputs that share a 4-bit scale (default: 128, or less)"
    )
    add_data_arguments(parser)


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    subject, *models = args.words or [""]
    if subject not in SUBJECTS:
        raise ConfigError(f"'{subject}' is nothing to compare" if subject else "no subject is named", _usage(subject))
    if len(models) != 1:
        problem = f"two models are named: {models[0]} and {models[1]}" if models else "no model is named"
        raise ConfigError(problem, "nvila bench quantize MODEL --data DATA")
    if args.data is None:
        raise ConfigError("there is no data to compare on", "name it with --data")
    if args.eval_samples == 0:
        raise ConfigError("--eval-samples is 0, so nothing can be compared", "use 1 or more")
    args.words = models
    prepare_workspace(settings)
    request = make_request(args, settings)
    from nvila_pipelines.quantization.comparison import HEAD, compare_schemes, form_row
    from nvila_pipelines.quantization.table import aligned
    from nvila_platform.telemetry import ProgressView

    with ProgressView(format=settings.log_format) as view:
        forms = list(compare_schemes(request, view.reporter("bench")))
    if args.json:
        emit_json({"model": str(request.model), "data": args.data, "forms": [form.to_dict() for form in forms]})
        return 0
    for line in aligned(HEAD, [form_row(form) for form in forms]):
        emit(line)
    return 0


def _usage(subject: str) -> str:
    return nearest(subject, SUBJECTS) if subject else "nvila bench quantize MODEL --data DATA"
