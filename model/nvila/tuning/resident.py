"""Resident memory of a base in 4 bits: what loading it leaves behind is given back before training starts."""

from __future__ import annotations

import contextlib
import ctypes
import gc

from torch import nn


def give_back(model: nn.Module) -> None:
    """Give back the file of the weights and free memory, after layers of a model were put into 4 bits.

    `from_pretrained` maps the file of the weights, and one tensor that still lies in it keeps all of it mapped: the
    few that do are copied. The heap is full of holes where wide layers were taken apart.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    # Replaced layers know each other in circles.
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
