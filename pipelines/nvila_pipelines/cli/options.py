"""Arguments that several verbs share, and what they resolve to."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.errors import ConfigError
from nvila_pipelines.cli.parser import WORDS
from nvila_platform.artifacts import storage_errors
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila_pipelines.recipe import Recipe

DEFAULT_RECIPE = "quickstart"
FAST_RECIPE = "fast"


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what every verb takes."""
    group = parser.add_argument_group("common options")
    group.add_argument(
        "--workspace", type=Path, metavar="DIR", help="folder for everything a run makes (default: ./nvila-workspace)"
    )
    group.add_argument("--json", action="store_true", help="end standard output with one JSON object")
    group.add_argument("--log-format", choices=("auto", "text", "json"), help="how logs and progress are written")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare a recipe with overrides."""
    parser.usage = "%(prog)s [RECIPE] [KEY=VALUE ...] [options]"
    parser.add_argument(
        WORDS,
        nargs="*",
        metavar="RECIPE KEY=VALUE",
        help=f"name or YAML file of a recipe (default: {DEFAULT_RECIPE}), then fields of it to change: seed=1",
    )
    parser.add_argument("--fast", action="store_true", help=f"the recipe {FAST_RECIPE}: fewer steps, lower accuracy")


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Load the recipe that the arguments name.

    Raises:
        ConfigError: The recipe or one of its fields is wrong, or two recipes are named.
    """
    from nvila_pipelines.recipe import load_recipe

    names = [word for word in args.words if "=" not in word]
    overrides = [word for word in args.words if "=" in word]
    if len(names) > 1:
        raise ConfigError(f"two recipes are named: {names[0]} and {names[1]}", "name one; overrides are key=value")
    if args.fast and names and names != [FAST_RECIPE]:
        raise ConfigError(f"--fast is the recipe {FAST_RECIPE}, {names[0]} is named too", "leave one of them out")
    return load_recipe(names[0] if names else FAST_RECIPE if args.fast else DEFAULT_RECIPE, overrides)


def prepare_workspace(settings: Settings) -> None:
    """Make sure that the workspace is a folder that can be written, before anything is worked on.

    Raises:
        ConfigError: It is a file, or cannot be made or written.
        ResourceError: The disk is full.
    """
    home = settings.workspace
    if home.exists() and not home.is_dir():
        raise ConfigError(f"workspace {home} is a file", "name a folder with --workspace")
    with storage_errors(home):
        home.mkdir(parents=True, exist_ok=True)
    if not os.access(home, os.W_OK | os.X_OK):
        raise ConfigError(f"workspace {home} cannot be written", "name another folder with --workspace")


def port_number(text: str) -> int:
    """Return a TCP port; for `type=` of an argument."""
    try:
        port = int(text)
    except ValueError:
        port = -1
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, use 1 to 65535, or 0 for a free one")
    return port


def whole_number(text: str) -> int:
    """Return a positive whole number; for `type=` of an argument."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def count(text: str) -> int:
    """Return a whole number from 0; for `type=` of an argument."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)


def share(text: str) -> float:
    """Return a share written as 0.01 or 1%; for `type=` of an argument."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)(%?)", text.strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share, write 0.01 or 1%")
    return value
