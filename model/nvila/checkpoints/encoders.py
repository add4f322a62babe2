"""The `image_encoder` and `video_encoder` of original checkpoints: class paths, looked up here and never imported.

A value is a class path, a dict with the path under `_target_` and arguments beside it, or such a dict as JSON text.
What an encoder does comes down to how video features are pooled.
"""

from __future__ import annotations

import json
from typing import Any

from nvila.errors import CheckpointError, nearest

NO_POOLING = [[1, 1, 1]]
BASIC_IMAGE = "llava.model.encoders.BasicImageEncoder"
BASIC_VIDEO = "llava.model.encoders.BasicVideoEncoder"
POOLING_VIDEO = "llava.model.encoders.TSPVideoEncoder"
_KNOWN = {"image_encoder": {BASIC_IMAGE}, "video_encoder": {BASIC_VIDEO, POOLING_VIDEO}}
# What surrounds every media item in all published models; others have no place in our token layout.
_FIXED_ARGUMENTS = {"start_token": None, "end_token": "\n", "sep_token": None}


def pool_sizes_of(value: object, where: str) -> list[list[int]]:
    """Return the pooling of a video encoder.

    Args:
        value: What the configuration says; None means the basic encoder.
        where: File, for messages.

    Raises:
        CheckpointError: The encoder is not one of ours or its arguments are wrong.
    """
    target, arguments = _parse("video_encoder", value, where)
    if target != POOLING_VIDEO:
        return [list(size) for size in NO_POOLING]
    sizes = arguments.get("pool_sizes")
    if not isinstance(sizes, list) or not sizes or not all(_is_triple(size) for size in sizes):
        raise CheckpointError(
            f"{where}: pool_sizes of video_encoder is {sizes!r}",
            "write a list of [frames, rows, columns], each 1 or more",
        )
    return sizes


def check_image_encoder(value: object, where: str) -> None:
    """Check that images are encoded the way we do.

    Raises:
        CheckpointError: They are not.
    """
    _parse("image_encoder", value, where)


def video_encoder(pool_sizes: list[list[int]]) -> dict[str, Any]:
    """Return the original form of a pooling."""
    if pool_sizes == NO_POOLING:
        return {"_target_": BASIC_VIDEO}
    return {"_target_": POOLING_VIDEO, "pool_sizes": pool_sizes}


def _parse(key: str, value: object, where: str) -> tuple[str, dict[str, Any]]:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise CheckpointError(f"{where}: {key} is not JSON: {e}", "write it as an object") from e
    if value is None or isinstance(value, str):
        value = {"_target_": value or min(_KNOWN[key])}
    target = value.get("_target_") if isinstance(value, dict) else None
    if not isinstance(value, dict) or target not in _KNOWN[key]:
        raise CheckpointError(f"{where}: {key} is {target or value!r}", nearest(str(target), _KNOWN[key]))
    for name, expected in _FIXED_ARGUMENTS.items():
        if value.get(name, expected) != expected:
            raise CheckpointError(
                f"{where}: {name} of {key} is {value[name]!r}, which NVILA models do not use", f"set it to {expected!r}"
            )
    return target, value


def _is_triple(size: object) -> bool:
    return isinstance(size, list) and len(size) == 3 and all(type(n) is int and n >= 1 for n in size)
