"""YAML as recipes use it: safe, numbers as people write them, and no key twice."""

from __future__ import annotations

import re
from typing import Any

import yaml

from nvila.errors import ConfigError

# YAML 1.1 wants a dot and a sign in the exponent, so that 5e-4 and 1e3 would be text.
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+|[-+]?\.[0-9]+[eE][-+]?[0-9]+")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' stands twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"^(?:{_FLOAT.pattern})$"), list("-+.0123456789"))


def parse_recipe_text(text: str, *, where: str) -> dict[str, Any]:
    """Parse the text of a recipe file.

    Args:
        text: YAML.
        where: The file, for the error message.

    Raises:
        ConfigError: It is not YAML, has a key twice, or is no mapping.
    """
    values = _load(text, where)
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

    Example:
        >>> parse_value("5e-4", where="lr"), parse_value("[0.9, 0.95]", where="betas")
        (0.0005, [0.9, 0.95])
    """
    return _load(text, where)


def _load(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None and "\n" in text.strip() else ""
        problem = getattr(e, "problem", None) or str(e).splitlines()[0]
        raise ConfigError(f"{where}{line}: {problem}", "correct the YAML; quote text that holds : or #") from e
