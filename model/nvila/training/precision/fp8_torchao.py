"""FP8 training through torchao: real FP8 products on GPUs that have them, its own emulation elsewhere."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn


def convert_linears(module: nn.Module, names: Collection[str]) -> None:
    """Replace linear layers by torchao's `Float8Linear`, with one dynamic scale a tensor, in place.

    Args:
        module: The decoder.
        names: Full names of the layers below it; both sides of each are multiples of 16.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(
        module,
        module_filter_fn=lambda _, name: name in names,
        # The kernels take 16 positions at a time, and the gradient of a weight is a product over all of them: without
        # padding a batch of any other length would end in an error.
        config=Float8LinearConfig(emulate=not torch.cuda.is_available(), pad_inner_dim=True),
    )
