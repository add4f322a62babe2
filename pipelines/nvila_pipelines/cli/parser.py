"""argparse with our errors: one line, one line with the fix, exit code 2."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from nvila.errors import nearest

_CHOICE = re.compile(r"invalid choice: '?(?P<given>[^']*)'? \(choose from (?P<known>.*)\)")
WORDS = "words"


class Parser(argparse.ArgumentParser):
    """A parser that takes options between positional words, and never guesses at shortened options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(  # type: ignore[override]  # typeshed has an overload a namespace type; there is one here
        self, args: Iterable[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse; words that follow an option still belong to the list of words.

        argparse closes a list of positionals at the first option: `run --fast seed=1` would lose its override.
        """
        found, rest = super().parse_known_args(list(args) if args is not None else None, namespace)
        if any(action.dest == WORDS for action in self._actions):
            late = [word for word in rest if not word.startswith("-")]
            setattr(found, WORDS, [*getattr(found, WORDS), *late])
            rest = [word for word in rest if word.startswith("-")]
        if rest:
            # Here rather than in the parser of all verbs, which does not know this one's options.
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Report wrong usage and exit with 2."""
        hint = f"see {self.prog} --help"
        choice = _CHOICE.search(message)
        if choice:
            known = [word.strip(" '") for word in choice["known"].split(",")]
            message = message[: choice.start()] + f"'{choice['given']}' is unknown"
            hint = f"{nearest(choice['given'], known)} {hint}" if len(known) > 1 else hint
        elif message.startswith("unrecognized arguments: "):
            given = message.removeprefix("unrecognized arguments: ").split()[0]
            options = [option for action in self._actions for option in action.option_strings]
            close = nearest(given, options)
            hint = f"{close} {hint}" if close.startswith("did") else hint
        sys.stderr.write(f"error: {message}\n  fix: {hint}\n")
        sys.exit(2)
