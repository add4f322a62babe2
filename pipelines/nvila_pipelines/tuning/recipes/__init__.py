"""Defaults of `nvila tune` for applications: one YAML file each, whose fields are options of the command."""

from __future__ import annotations

import argparse
from pathlib import Path

from nvila.errors import ConfigError, nearest
from nvila.yaml_text import parse_yaml

_HOME = Path(__file__).resolve().parent
# What a recipe may say; where model, data and results are is the command's.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "rank": int,
    "lr": (int, float),
    "lr_ratio": (int, float, str),
    "epochs": (int, float),
    "scorer": str,
    "tasks": str,
    "guard": str,
    "samples_per_image": int,
}


def recipe_names() -> list[str]:
    """Return the built-in recipes."""
    return sorted(path.stem for path in _HOME.glob("*.yaml"))


def apply_recipe(args: argparse.Namespace, name: str) -> None:
    """Fill options that the command line leaves open from a recipe.

    Raises:
        ConfigError: There is no such recipe, or a field of it is unknown or of another kind.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _HOME / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"there is no tuning recipe '{name}'", nearest(name, recipe_names()))
    fields = parse_yaml(path.read_text(encoding="utf-8"), where=str(path))
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} is no mapping of options", "write scorer: exact_match, one option a line")
    for field, value in fields.items():
        if field not in FIELDS:
            raise ConfigError(f"{path}: unknown field '{field}'", nearest(str(field), FIELDS))
        if not isinstance(value, FIELDS[field]) or isinstance(value, bool):
            raise ConfigError(f"{path}: {field} is {value!r}", "expected what the option of that name takes")
        if field == "method" and any(getattr(args, part) is not None for part in ("vision", "projector", "language")):
            continue
        if getattr(args, field) is None:
            setattr(args, field, value)
