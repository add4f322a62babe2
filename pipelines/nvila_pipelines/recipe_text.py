"""The text of a recipe file, and of one value of it."""

from __future__ import annotations

from typing import Any

from nvila.errors import ConfigError
from nvila.yaml_text import parse_yaml


def parse_recipe_text(text: str, *, where: str) -> dict[str, Any]:
    """Parse the text of a recipe file.

    Args:
        text: YAML.
        where: The file, for the error message.

    Raises:
        ConfigError: It is not YAML, has a key twice, or is no mapping.
    """
    values = parse_yaml(text, where=where)
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"a {type(values).__name__}"
        raise ConfigError(
            f"{where}: a recipe is a mapping of fields, this is {kind}", "start with `extends: quickstart`"
        )
    return values


def parse_value(text: str, *, where: str) -> Any:
    """Parse the value of an override.

    Raises:
        ConfigError: It is not YAML.
    """
    return parse_yaml(text, where=where)
