"""Figures that were drawn before are read instead of drawn: a run that reuses its steps shows the same curves again."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache, wraps
from importlib.metadata import version
from pathlib import Path
from typing import ParamSpec

P = ParamSpec("P")

# A file that a crash cut short is drawn again.
_END = "</svg>\n"
_FOLDER: ContextVar[Path | None] = ContextVar("figures", default=None)


@contextlib.contextmanager
def kept_in(folder: Path | None) -> Iterator[None]:
    """Keep figures in a folder for the time of a `with` block; None keeps nothing."""
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def kept(draw: Callable[P, str]) -> Callable[P, str]:
    """Draw the same data once.

    The name of a figure's file is a digest of what it is drawn from: the data, the source of the module that draws, and
    the version of the plotting library. A folder that cannot be written costs time and nothing else.

    Args:
        draw: Returns SVG text that follows from its arguments, which show all that they hold when they are printed.
    """

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        folder = _FOLDER.get()
        if folder is None:
            return draw(*args, **kwargs)
        what = repr((_drawn_by(inspect.getfile(draw)), draw.__qualname__, args, sorted(kwargs.items())))
        path = folder / f"{hashlib.sha256(what.encode()).hexdigest()}.svg"
        with contextlib.suppress(OSError, UnicodeDecodeError):
            svg = path.read_text(encoding="utf-8")
            if svg.endswith(_END):
                return svg
        svg = draw(*args, **kwargs)
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{path.name}.{os.getpid()}")
            unfinished.write_text(svg, encoding="utf-8")
            unfinished.replace(path)
        return svg

    return drawn


@cache
def _drawn_by(module: str) -> tuple[str, str]:
    return hashlib.sha256(Path(module).read_bytes()).hexdigest(), version("matplotlib")
