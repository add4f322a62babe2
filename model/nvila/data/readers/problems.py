"""Why one record cannot be used; never leaves the readers as an exception."""

from __future__ import annotations

import math
from typing import Any

_LONGEST = 300


class RecordError(Exception):
    """A record cannot be used; the message says why in one line."""


def one_line(text: str) -> str:
    """Return a message as one line that can be written anywhere."""
    line = " ".join(text.split()).encode(errors="backslashreplace").decode()
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def text_of(value: Any, what: str) -> str:
    """Return a text; numbers count as one.

    Raises:
        RecordError: It is something else, or cannot be written as UTF-8.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RecordError(f"{what} is no text but {kind_of(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"{what} is no text but {value}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecordError(f"{what} holds half a character (a lone surrogate)") from None
    return text


def kind_of(value: Any) -> str:
    """Name the kind of a value as JSON does."""
    kinds = {bool: "a boolean", dict: "an object", list: "an array", str: "a text", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), f"of type {type(value).__name__}")
