"""Subtitles of videos: SRT files, and the lines that are shown at given moments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nvila.errors import DataError

_TIME = r"(\d+):(\d\d):(\d\d)[,.](\d{1,3})"
_SPAN = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}")
_TAG = re.compile(r"<[^>]*>")


@dataclass(frozen=True, slots=True)
class Line:
    """One line: shown from `start` until before `end`, in seconds."""

    start: float
    end: float
    text: str


def read_subtitles(path: Path) -> list[Line]:
    """Read an SRT file; tags for fonts and colours are dropped.

    Raises:
        DataError: It cannot be read, or holds no subtitles.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}", "check the file") from e
    lines = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").strip()):
        rows = block.split("\n")
        at = next((number for number, row in enumerate(rows) if _SPAN.match(row)), None)
        if at is None:
            continue
        match = _SPAN.match(rows[at])
        assert match is not None, "found above"
        said = " ".join(" ".join(_TAG.sub("", row) for row in rows[at + 1 :]).split())
        if said:
            lines.append(Line(_seconds(match.groups()[:4]), _seconds(match.groups()[4:]), said))
    if not lines and text.strip():
        raise DataError(f"{path} holds no subtitles", "write SRT: a number, a time span and a text a block")
    return lines


def shown_at(lines: Sequence[Line], moments: Sequence[float]) -> list[str]:
    """Return the texts that are shown at one of the moments, in the order of the file, each line once."""
    return [line.text for line in lines if any(line.start <= moment < line.end for moment in moments)]


def _seconds(parts: Sequence[str]) -> float:
    hours, minutes, seconds, fraction = parts
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction.ljust(3, "0")) / 1000
