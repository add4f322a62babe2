"""Standard output of the command: text for people or one JSON object for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any


def emit(text: str) -> None:
    """Write a line, at once: whoever reads a pipe may wait for it."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def emit_json(value: Mapping[str, Any]) -> None:
    """Write an object as one line."""
    emit(json.dumps(value, ensure_ascii=False))
