"""FP8 training through NVIDIA Transformer Engine (Hopper and later)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from nvila.errors import CapabilityError

# Its FP8 products take no other number of positions.
_MULTIPLE = 16


def is_available() -> bool:
    """Whether Transformer Engine can be imported and this GPU has FP8 units.

    A half-installed package raises RuntimeError or OSError on import, not only ImportError.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def convert_linears(module: nn.Module, names: Collection[str]) -> None:
    """Replace linear layers by Transformer Engine's, which share their parameters, in place.

    Args:
        module: The decoder.
        names: Full names of the layers below it.
    """
    te = _transformer_engine()

    class PaddedLinear(te.Linear):  # type: ignore[misc,name-defined]  # known on a GPU machine only
        def forward(self, inp: Tensor, *args: Any, **options: Any) -> Tensor:
            return in_whole_blocks(lambda x: te.Linear.forward(self, x, *args, **options), inp)

    for name in names:
        linear = cast("nn.Linear", module.get_submodule(name))
        layer = PaddedLinear(
            linear.in_features,
            linear.out_features,
            bias=linear._parameters["bias"] is not None,
            params_dtype=linear.weight.dtype,
            device="meta",
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer)


def in_whole_blocks(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a layer to (..., features) with zeros behind the last position, as many as its kernels want to see.

    Zeros change no scale and no gradient, and what they become is cut off.
    """
    rows = x.flatten(0, -2)
    missing = -rows.shape[0] % _MULTIPLE
    if not missing:
        return product(x)
    y = product(pad(rows, (0, 0, 0, missing)))[: rows.shape[0]]
    return y.view(*x.shape[:-1], -1)


def autocast() -> AbstractContextManager[Any]:
    """Return the context in which those layers compute in FP8: E4M3 forward, E5M2 backward, dynamic scales."""
    from transformer_engine.common.recipe import Float8CurrentScaling, Format

    recipe = Float8CurrentScaling(fp8_format=Format.HYBRID)
    return cast("AbstractContextManager[Any]", _transformer_engine().fp8_autocast(enabled=True, fp8_recipe=recipe))


def _transformer_engine() -> Any:
    if not is_available():
        raise CapabilityError(
            "Transformer Engine is not installed, or this machine has no GPU of compute capability 9.0",
            "use train.fp8.backend=torchao or emulated",
        )
    import transformer_engine.pytorch as te

    return te
