"""Bringing answers into the form in which they are compared."""

from __future__ import annotations

import string
import unicodedata

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


def squash(text: str) -> str:
    """Lower case, single spaces, none at the ends."""
    return " ".join(text.lower().split())


def ascii_digits(text: str) -> str:
    r"""Write the decimal digits of every script as 0 to 9, and full-width letters and signs as usual ones.

    Example:
        >>> ascii_digits("\u0664\uff12")
        '42'
    """
    if text.isascii():
        return text
    return "".join(str(unicodedata.decimal(char)) if char.isdecimal() else char for char in full_width(text))


def full_width(text: str) -> str:
    """Write full-width letters, digits and signs as usual ones."""
    return text.translate(_FULL_WIDTH)


def plain(text: str) -> str:
    """Lower case without ASCII punctuation: what `ignore_case` and `ignore_punctuation` of lmms-eval compare.

    Example:
        >>> plain(" It's Red. ")
        'its red'
    """
    return squash(ascii_digits(text).translate(_PUNCTUATION))


def number(text: str) -> float | None:
    """Read a finite number; None for other texts."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value - value == 0 else None
