"""Why a record has no score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

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
