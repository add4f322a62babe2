"""`nvila train`."""

from __future__ import annotations

import argparse

from nvila_pipelines.cli.options import add_recipe_arguments
from nvila_pipelines.cli.step import run_to
from nvila_platform.settings import Settings

SUMMARY = "train the model of a recipe, with the steps it needs before"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    add_recipe_arguments(parser)


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    return run_to("train", args, settings)
