"""How numbers look to people, the same in the HTML file and on the terminal."""

from __future__ import annotations

import math
from typing import Any

MISSING = "-"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def percent(share: float | None) -> str:
    """Format a share between 0 and 1.

    Example:
        >>> percent(0.9812)
        '98.1 %'
    """
    return MISSING if share is None or not math.isfinite(share) else f"{share * 100:.1f} %"


def points(difference: float | None) -> str:
    """Format a difference of two shares in percentage points, with its sign."""
    return MISSING if difference is None or not math.isfinite(difference) else f"{difference * 100:+.2f}"


def size(num_bytes: float | None) -> str:
    """Format a number of bytes.

    Example:
        >>> size(1536)
        '1.5 KiB'
    """
    if num_bytes is None:
        return MISSING
    power = 0
    while num_bytes >= 1024 and power < len(_UNITS) - 1:
        num_bytes, power = num_bytes / 1024, power + 1
    return f"{num_bytes:.0f} B" if power == 0 else f"{num_bytes:.1f} {_UNITS[power]}"


def duration(seconds: float | None) -> str:
    """Format a time span.

    Example:
        >>> duration(252.4)
        '4 min 12 s'
    """
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def step_time(seconds: float) -> str:
    """Format the time of a step; one that took none was not run, its result was there."""
    return duration(seconds) if seconds > 0 else "reused"


def number(value: Any) -> str:
    """Format a value of unknown kind: four significant digits for numbers, the text of anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return MISSING if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def amount(value: float | None) -> str:
    """Format hours, energy or money, which may be very small.

    Example:
        >>> amount(0.00012345), amount(0.00000012)
        ('0.000123', 'under 0.0001')
    """
    if value is None:
        return MISSING
    if value >= 100:
        return f"{value:,.2f}"
    if value >= 0.0001:
        return f"{value:.3g}"
    return "under 0.0001" if value else "0"


def shortened(text: str, limit: int = 280) -> str:
    """Cut a long text, so that one record cannot fill the page."""
    return text if len(text) <= limit else text[: limit - 3].rstrip() + "..."
