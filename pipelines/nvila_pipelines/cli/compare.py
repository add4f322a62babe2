"""`nvila compare`: two models on the same samples."""

from __future__ import annotations

import argparse

from nvila_pipelines.cli.evaluation_options import add_evaluation_arguments, places_of_data, request_of
from nvila_pipelines.cli.options import prepare_workspace
from nvila_pipelines.cli.output import emit, emit_json
from nvila_pipelines.cli.parser import WORDS
from nvila_platform.settings import Settings

SUMMARY = "compare two models on the same samples, with a test and the samples that changed"
EPILOG = """\
A and B are model folders (wide or quantized), models:/NAME@ALIAS, addresses of OpenAI endpoints, or finished
evaluations: a DATE_results.json, or a folder with such files, of which the newest counts.

examples:
  nvila compare models:/nvila@champion models:/nvila@candidate
  nvila compare MODEL QUANTIZED --tasks chartqa --data chartqa=/data/chartqa
  nvila compare models:/nvila@champion http://nvila.example.org --tasks digit_pages
  nvila compare evaluations/wide evaluations/quantized

outputs in DIR/A-vs-B:
  comparison.html   differences with intervals, categories, samples that changed with their pictures
  comparison.json   the same for machines
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.usage = "%(prog)s A B [--tasks TASKS] [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(WORDS, nargs="*", metavar="A B", help="the reference, and what is compared with it")
    add_evaluation_arguments(parser)


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    from nvila_pipelines.evaluation.compare import (
        compare_sides,
        comparison_lines,
        left_out_lines,
        verdict_lines,
        write_comparison,
    )
    from nvila_pipelines.evaluation.sides import check_two, logged_side
    from nvila_platform.telemetry import ProgressView

    words = check_two(args.words)
    prepare_workspace(settings)
    with ProgressView(format=settings.log_format) as view:
        reference, candidate = (
            logged_side(word, lambda model: request_of(model, args, settings), settings, view) for word in words
        )
        view.reporter("compare").progress("compare", 0, 0)
        comparison = compare_sides(reference, candidate, seed=args.seed or 0)
        out = (args.out or settings.workspace / "evaluations").absolute() / "comparisons"
        page = write_comparison(comparison, out, settings, places_of_data(args))
    if args.json:
        emit_json(comparison.to_dict() | {"page": str(page)})
        return 0
    emit(f"A  {comparison.names[0]}\nB  {comparison.names[1]}\n")
    for line in [*comparison_lines(comparison), "", *verdict_lines(comparison), *left_out_lines(comparison)]:
        emit(line)
    emit(f"page: {page}")
    return 0
