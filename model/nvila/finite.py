"""Finding NaN and infinity where they come in, before they have spread to everything."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nvila.errors import CheckpointError, DataError


def all_finite(values: Tensor) -> bool:
    """Whether every element is a finite number; integers always are."""
    if not values.is_floating_point() or values.device.type == "meta":
        return True
    # One pass without a mask as large as the values: a sum is finite only if its terms are.
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


def check_finite(values: Tensor, name: str) -> None:
    """Refuse media with elements that are no finite numbers.

    Args:
        values: Tiles, frames or visual tokens, one after the other in the first dimension.
        name: Name of the argument.

    Raises:
        DataError: With the first of them in `values` that is broken.
    """
    if torch.compiler.is_compiling() or all_finite(values):
        return
    broken = ~values.flatten(1).isfinite().all(1) if values.dim() > 1 else ~values.isfinite()
    raise DataError(
        f"{name}[{int(broken.nonzero()[0])}] holds NaN or infinity ({int(broken.sum())} of {len(values)} do)",
        "check what the media were made from; a processor makes values of a few units",
    )


def check_weights(weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights with elements that are no finite numbers.

    Args:
        weights: By name.
        where: The checkpoint, for the message.

    Raises:
        CheckpointError: With the name of the first.
    """
    for name, value in weights.items():
        if not all_finite(value.detach()):
            raise CheckpointError(
                f"the weight {name} in {where} holds NaN or infinity",
                "take a checkpoint from before training diverged, or download it again",
            )
