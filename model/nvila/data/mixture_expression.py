"""The spelling of mixtures: `charts + docs*3 + photos@half`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nvila.errors import ConfigError

_QUOTED = r"\"[^\"]+\"|'[^']+'"
_TERM = re.compile(
    rf"\s*(?P<name>{_QUOTED}|[^+@\s\"']+?)"
    r"(?:\s*\*\s*(?P<times>\d+))?"
    rf"(?:\s*@\s*(?P<selection>{_QUOTED}|[^+@\s\"']+))?"
    r"\s*(?:\+|$)"
)


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a mixture.

    Args:
        name: A data set, a mixture, or a path.
        times: How often it is repeated.
        selection: What it is cut down to: a path, or None for all of it.
    """

    name: str
    times: int = 1
    selection: str | None = None


def parse_expression(text: str) -> list[Term]:
    """Take a mixture apart.

    Args:
        text: Terms `NAME*TIMES@SELECTION` joined by `+`; names with `+`, `@` or white space stand in quotes.

    Raises:
        ConfigError: It is spelled differently.

    Example:
        >>> parse_expression("a + b*2@half")
        [Term(name='a', times=1, selection=None), Term(name='b', times=2, selection='half')]
    """
    terms: list[Term] = []
    position = 0
    while position < len(text) or not terms or text.rstrip().endswith("+"):
        found = _TERM.match(text, position)
        if found is None:
            raise ConfigError(
                f"mixture {text!r} cannot be read from character {position + 1} on",
                "write NAME*TIMES@SELECTION joined by +; quote names with + or @ or blanks",
            )
        terms.append(_term(found, text))
        position = found.end()
    return terms


def _term(found: re.Match[str], text: str) -> Term:
    selection = found["selection"]
    if selection is not None and not selection.startswith(("'", '"')) and "*" in selection:
        raise ConfigError(
            f"mixture {text!r}: '{selection}' is no selection", "write the number first: NAME*TIMES@SELECTION"
        )
    times = int(found["times"] or 1)
    if times == 0:
        raise ConfigError(f"mixture {text!r} repeats '{found['name']}' 0 times", "leave it out")
    return Term(_unquoted(found["name"]), times, None if selection is None else _unquoted(selection))


def _unquoted(name: str) -> str:
    return name[1:-1] if name.startswith(("'", '"')) else name
