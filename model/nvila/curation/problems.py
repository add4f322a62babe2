"""Why a record has no score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from nvila.errors import DataError

Status = Literal["ok", "unreadable", "no_answer", "bad_media", "too_long", "not_finite", "duplicate"]

OK: Status = "ok"
STATUSES: tuple[str, ...] = get_args(Status)
MEANINGS: Mapping[str, str] = {
    "ok": "scored by both models",
    "unreadable": "the record cannot be read, or no conversation can be made of it",
    "no_answer": "there is no answer to score",
    "bad_media": "an image or video is missing, damaged or of no use to the model",
    "too_long": "longer than the context of a model",
    "not_finite": "a model gave no number",
    "duplicate": "a record with this id came before it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why one record is set aside."""

    status: Status
    reason: str


def check_share(bad: Mapping[str, int], total: int, max_bad: float, first: str) -> None:
    """Refuse a data set of which too much cannot be used.

    Args:
        bad: Number of unusable records by status.
        total: Records of the data set.
        max_bad: Largest share that is accepted.
        first: Where the first of them is, and what is wrong with it.

    Raises:
        DataError: With a summary.
    """
    count = sum(bad.values())
    if count > max_bad * total:
        kinds = ", ".join(f"{number} {status}" for status, number in sorted(bad.items()))
        raise DataError(
            f"{count} of {total} records ({count / total:.1%}) cannot be used, more than {max_bad:.1%}: {kinds}; "
            f"first: {first}",
            "quarantine.jsonl names each; raise --max-bad, or mend the data and score it into a new folder",
        )
