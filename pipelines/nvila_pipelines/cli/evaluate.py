"""`nvila evaluate`."""

from __future__ import annotations

import argparse

from nvila_pipelines.cli.options import add_recipe_arguments
from nvila_pipelines.cli.step import run_to
from nvila_platform.settings import Settings

SUMMARY = "measure a model on the recipe's split, with the steps it needs before"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    add_recipe_arguments(parser)
    parser.add_argument(
        "--model",
        choices=("wide", "quantized"),
        default="quantized",
        help="which form of the model (default: quantized)",
    )


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    return run_to(f"evaluate-{args.model}", args, settings)
