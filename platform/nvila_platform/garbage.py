"""Removing what nobody needs from a store.

Kept is what a registered version was made of, from its gate to its data; what was made or reused lately, and what that
was made of; and everything that is younger than the limit. What is left can be made again from its recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol

Kind = Literal["artifact", "unfinished", "damaged", "copy", "upload"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One thing in a store that can be removed as a whole.

    Args:
        kind: A finished artifact, unfinished work, a damaged artifact that was set aside, a fetched copy, or an
            upload that never ended.
        name: Where it is, for people and for the inventory.
        digest: Of an artifact; empty otherwise.
        size_bytes: What its removal gives back.
        used_at: When it was made or reused last.
    """

    kind: Kind
    name: str
    digest: str = ""
    size_bytes: int
    used_at: datetime


class Inventory(Protocol):
    """What a kind of store has to offer for this."""

    def stored(self) -> Iterator[Stored]:
        """Yield everything that could be removed."""

    def inputs(self, digest: str) -> Mapping[str, str]:
        """Return digests by name of what an artifact was made of; nothing for one that is not here."""

    def remove(self, one: Stored, before: datetime) -> bool:
        """Remove one thing; returns False when it was used after `before` after all."""


def unneeded(inventory: Inventory, needed: Iterable[str], before: datetime) -> list[Stored]:
    """Return what nobody needs, the largest first.

    Args:
        inventory: The store.
        needed: Digests that somebody relies on.
        before: What was used later stays.
    """
    found = list(inventory.stored())
    recent = {one.digest for one in found if one.digest and one.used_at >= before}
    kept = _closure(inventory, {*needed, *recent})
    old = [one for one in found if one.used_at < before and one.digest not in kept]
    return sorted(old, key=lambda one: (-one.size_bytes, one.name))


def remove(inventory: Inventory, victims: Iterable[Stored], before: datetime) -> list[Stored]:
    """Remove things and return those that are gone; one that came into use meanwhile stays."""
    return [one for one in victims if inventory.remove(one, before)]


def _closure(inventory: Inventory, digests: set[str]) -> set[str]:
    """Add all that these were made of."""
    known: set[str] = set()
    todo = list(digests)
    while todo:
        digest = todo.pop()
        if digest not in known:
            known.add(digest)
            todo += inventory.inputs(digest).values()
    return known
