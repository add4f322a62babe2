"""Reading JSON bodies of strangers."""

from __future__ import annotations

import json
import re
from typing import Any

from nvila_platform.serving.errors import ApiError

_SURROGATE = re.compile(rb"\\u[dD][89abAB]|\\u[dD][c-fC-F]")


def decode_json(body: bytes) -> Any:
    """Decode a JSON body.

    Raises:
        ApiError: It is no JSON, nested too deep, or holds text that no encoding can carry.
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
        if _SURROGATE.search(body):
            # Halves of pairs are strings to Python and to no one else: tokenizers and answers would fail on them.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:
        reason = f"{e.msg} at character {e.pos}" if isinstance(e, json.JSONDecodeError) else "not readable"
        raise ApiError(400, "invalid_json", f"the body is not valid JSON: {reason}") from e
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)
