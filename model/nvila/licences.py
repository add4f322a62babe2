"""What may be done with weights that were made of other weights."""

from __future__ import annotations

import re
from collections.abc import Iterable

UNKNOWN = "unknown"
# They ask for nothing but to be named, so weights that are made of them may carry another licence.
_PERMISSIVE = ("apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause", "isc", "cc0-1.0", "unlicense")
# Names of licences that forbid earning money without saying it in their names.
_CLOSED = frozenset({"apple-amlr", "apple-ascl", "deepfloyd-if-license", "intel-research", "h-research"})
_NON_COMMERCIAL = re.compile(r"(^|[^a-z])(nc|non-?commercial|research)([^a-z]|$)")


def combined(licences: Iterable[str]) -> str:
    """Return the licence of weights that were made of others, as far as it follows from theirs.

    Permissive licences give way to stricter ones. Several strict ones all hold, so all are named.

    Example:
        >>> combined(["apache-2.0", "gemma"])
        'gemma'
        >>> combined(["apache-2.0", "unknown"])
        'unknown'
    """
    found = list(dict.fromkeys(one.strip().lower() or UNKNOWN for one in licences))
    strict = [one for one in found if one not in _PERMISSIVE]
    # What nobody knows may forbid anything; what is known to forbid something is still worth saying.
    named = [one for one in strict if one != UNKNOWN]
    if UNKNOWN in strict and not any(map(is_non_commercial, named)):
        return UNKNOWN
    if named:
        return " and ".join(sorted(named))
    return min(found, key=_PERMISSIVE.index, default=UNKNOWN)


def is_non_commercial(licence: str) -> bool:
    """Whether a licence forbids commercial use, by its name on the Hugging Face Hub.

    Example:
        >>> is_non_commercial("cc-by-nc-4.0"), is_non_commercial("apache-2.0")
        (True, False)
    """
    plain = licence.lower()
    return bool(_NON_COMMERCIAL.search(plain)) or bool(_CLOSED & set(plain.split(" and ")))
