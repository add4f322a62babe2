"""`nvila store`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from nvila_pipelines.cli.output import emit, emit_json
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila_platform.garbage import Inventory, Stored

SUMMARY = "look after the artifact store"

_UNITS = {"h": "hours", "d": "days", "w": "weeks"}
_MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    parser.add_argument(
        "action",
        choices=("gc",),
        metavar="gc",
        help="list what no registered version and no recent work needs, and with --delete remove it",
    )
    parser.add_argument(
        "--older-than",
        type=age,
        default=timedelta(days=14),
        metavar="AGE",
        help="spare what was made or reused since, such as 12h, 14d or 4w; longer than any run takes (default: 14d)",
    )
    parser.add_argument("--delete", action="store_true", help="remove it; without this it is only listed")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    from nvila_platform.garbage import remove, unneeded
    from nvila_platform.registry import needed_digests

    before = datetime.now(UTC) - args.older_than
    needed = needed_digests(settings)
    inventories = open_inventories(settings)
    found: list[Stored] = []
    for inventory in inventories:
        victims = unneeded(inventory, needed, before)
        found += remove(inventory, victims, before) if args.delete else victims
    _show(found, args)
    return 0


def open_inventories(settings: Settings) -> Sequence[Inventory]:
    """Return the inventory of the store, and of its working folder where that is another place."""
    from nvila_platform.garbage_folder import FolderInventory
    from nvila_platform.store import LocalStore, open_store

    store = open_store(settings)
    if isinstance(store, LocalStore):
        return [FolderInventory(store)]
    from nvila_platform.garbage_s3 import S3Inventory
    from nvila_platform.s3_store import S3Store

    assert isinstance(store, S3Store)
    return [S3Inventory(store), FolderInventory(store.local)]


def age(text: str) -> timedelta:
    """Return a length of time written as 14d; for `type=` of an argument."""
    match = re.fullmatch(r"([0-9]+)([hdw])", text)
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no age, write 12h, 14d or 4w")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _show(found: Sequence[Stored], args: argparse.Namespace) -> None:
    total = sum(one.size_bytes for one in found)
    if args.json:
        rows = [{"kind": one.kind, "name": one.name, "size_bytes": one.size_bytes} for one in found]
        emit_json({"deleted": args.delete, "size_bytes": total, "found": rows})
        return
    for one in found:
        emit(f"{one.kind:<10} {one.size_bytes / _MIB:9.1f} MiB  {one.used_at:%Y-%m-%d}  {one.name}")
    what = "removed" if args.delete else "nobody needs these; --delete removes them:" if found else "found"
    emit(f"{what} {len(found)} things, {total / _MIB:,.1f} MiB")
