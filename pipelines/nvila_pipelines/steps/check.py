"""The first task of a graph: parameters that are wrong end the run in seconds, with the name of the field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nvila.errors import ConfigError
from nvila_pipelines.recipe import Recipe, changed_recipe, load_recipe
from nvila_pipelines.steps.component import run_task

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


class Checked(NamedTuple):
    """What the other tasks of the graph are given."""

    recipe: str
    run_id: str


def check_run(recipe: str, overrides: Sequence[str], fields: Mapping[str, str], run_id: str) -> Checked:
    """Resolve a recipe and name the run.

    Args:
        recipe: Name, or a resolved recipe as JSON.
        overrides: `dotted.key=value` words.
        fields: Values by dotted key; an empty one leaves the recipe's.
        run_id: Name of the run.

    Raises:
        SystemExit: A parameter is wrong; the typed error was left for the parent process.
    """
    words = [*overrides, *(f"{name}={value}" for name, value in fields.items() if value)]
    name = _UNSAFE.sub("-", run_id).strip("-.")
    found = run_task("check", name, lambda _: _resolve(recipe, words, name))
    return Checked(found.to_json(), name)


def _resolve(recipe: str, words: Sequence[str], name: str) -> Recipe:
    if not name:
        raise ConfigError("the run has no name", "set the parameter run_id")
    if recipe.lstrip().startswith("{"):
        return changed_recipe(Recipe.from_json(recipe), words)
    return load_recipe(recipe, words)
