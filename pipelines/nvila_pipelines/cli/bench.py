"""`nvila bench`: comparisons on one's own model and data."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nvila.errors import ConfigError, nearest
from nvila_pipelines.cli.options import prepare_workspace, whole_number
from nvila_pipelines.cli.output import emit, emit_json
from nvila_pipelines.cli.parser import WORDS
from nvila_pipelines.cli.quantize import SCHEMES, add_data_arguments, chosen_device, data_spec, make_request
from nvila_pipelines.cli.serve import COMPILE, DECODERS, find_model
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila_pipelines.inference.comparison import ServingRequest

SUMMARY = "compare ways to run a model on your own data"
SUBJECTS = ("quantize", "serve")
EPILOG = """\
examples:
  nvila bench quantize MODEL --data mine.jsonl       every scheme: size, accuracy, errors, speed against the wide model
  nvila bench serve MODEL --data mine.jsonl          the engine at 1, 4 and 16 streams against generate, one at a time

Speeds are measured in turns, with the wide model or with generate; a ratio stands with its range over repeats.
"""
# Options of one subject; with the other one they would be ignored.
_OWN = {
    "quantize": ("vision", "language", "group_size", "samples", "eval_samples"),
    "serve": ("requests", "max_tokens", "streams", "decoder", "compile"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s {quantize,serve} MODEL --data DATA [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        WORDS, nargs="*", metavar="SUBJECT MODEL", help="quantize or serve; then a model folder or models:/NAME@ALIAS"
    )
    schemes = parser.add_argument_group("quantize", "What is compared beside int8 and fp8.")
    schemes.add_argument("--vision", choices=SCHEMES, help="of the vision tower (default: w8a8)")
    schemes.add_argument("--language", choices=SCHEMES, help="of the language model (default: w4a16)")
    schemes.add_argument(
        "--group-size", type=whole_number, metavar="N", help="inputs that share a 4-bit scale (default: 128, or less)"
    )
    serving = parser.add_argument_group("serve", "How the model is asked.")
    serving.add_argument("--requests", type=whole_number, metavar="N", help="conversations to answer (default: 32)")
    serving.add_argument("--max-tokens", type=whole_number, metavar="N", help="most tokens of an answer (default: 64)")
    serving.add_argument("--streams", type=_streams, metavar="N,N", help="callers at once (default: 1,4,16)")
    serving.add_argument("--decoder", choices=DECODERS, help="what runs the language model (default: auto)")
    serving.add_argument(
        "--compile", choices=COMPILE, help="compile decoding, on CUDA record graphs of it (default: auto)"
    )
    add_data_arguments(parser)


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    subject, *models = args.words or [""]
    if subject not in SUBJECTS:
        raise ConfigError(f"'{subject}' is nothing to compare" if subject else "no subject is named", _usage(subject))
    if len(models) != 1:
        problem = f"two models are named: {models[0]} and {models[1]}" if models else "no model is named"
        raise ConfigError(problem, f"nvila bench {subject} MODEL --data DATA")
    if args.data is None:
        raise ConfigError("there is no data to compare on", "name it with --data")
    for other, names in _OWN.items():
        given = [name for name in names if other != subject and getattr(args, name) is not None]
        if given:
            raise ConfigError(f"--{given[0].replace('_', '-')} is about {other}, not {subject}", "leave it out")
    args.words = models
    return (_quantize if subject == "quantize" else _serve)(args, settings)


def _quantize(args: argparse.Namespace, settings: Settings) -> int:
    if args.eval_samples == 0:
        raise ConfigError("--eval-samples is 0, so nothing can be compared", "use 1 or more")
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


def _serve(args: argparse.Namespace, settings: Settings) -> int:
    prepare_workspace(settings)
    request = _serving_request(args, settings)
    from nvila_pipelines.inference.comparison import HEAD, compare_serving, way_row
    from nvila_pipelines.quantization.table import aligned
    from nvila_platform.telemetry import ProgressView

    with ProgressView(format=settings.log_format) as view:
        ways = compare_serving(request, view.reporter("bench"))
    if args.json:
        emit_json({"model": str(request.model), "data": args.data, "ways": [way.to_dict() for way in ways]})
        return 0
    for line in aligned(HEAD, [way_row(way) for way in ways]):
        emit(line)
    return 0


def _serving_request(args: argparse.Namespace, settings: Settings) -> ServingRequest:
    from nvila_pipelines.inference.comparison import ServingRequest

    given = {name: value for name in _OWN["serve"] if (value := getattr(args, name)) is not None}
    return ServingRequest(
        model=find_model(args.words[0], settings).directory,
        data=data_spec(args),
        dtype=args.dtype,
        device=chosen_device(args.device or "auto"),
        **given,
    )


def _streams(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(whole_number(one.strip()) for one in text.split(",")))


def _usage(subject: str) -> str:
    return nearest(subject, SUBJECTS) if subject else "nvila bench serve MODEL --data DATA"
