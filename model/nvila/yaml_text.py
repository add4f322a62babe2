"""YAML as people write it: safe, numbers in any spelling, and no key twice."""

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


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse YAML.

    Args:
        text: The YAML.
        where: The file or option, for the error message.

    Raises:
        ConfigError: It is not YAML, or has a key twice.

    Example:
        >>> parse_yaml("5e-4", where="lr"), parse_yaml("[0.9, 0.95]", where="betas")
        (0.0005, [0.9, 0.95])
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None and "\n" in text.strip() else ""
        problem = getattr(e, "problem", None) or str(e).splitlines()[0]
        raise ConfigError(f"{where}{line}: {problem}", "correct the YAML; quote text that holds : or #") from e
