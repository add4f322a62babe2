"""FP8 training on any device, emulated: values are rounded to FP8, products run in the wide type.

The numbers are those of FP8 tensor cores with wide accumulation (COAT, arXiv 2410.19313, and the NVILA recipe):
inputs and weights in E4M3, output gradients in E5M2, one dynamic scale a tensor, all three products of a layer on
rounded operands. Neither time nor memory is saved; the point is that FP8 numerics can be trained and tested anywhere.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_TINY = 1e-10
# Stored mantissa bits and the exponent of the smallest normal number.
_GRIDS = {E4M3: (3, -6), E5M2: (2, -14)}


def round_to_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a tensor to FP8 with one dynamic scale and return it in its own type.

    The scale is `(max|x| + 1e-10) / max(dtype)`, so the largest value lands on the largest FP8 number and nothing
    overflows.
    """
    low, high = torch.aminmax(x)
    scale = (torch.maximum(-low, high) + _TINY) / torch.finfo(dtype).max
    if x.dtype != torch.float32:
        return (x / scale).to(dtype).to(x.dtype) * scale
    return round_to_grid(x / scale, dtype).mul_(scale)


def round_to_grid(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 values in the range of `dtype` to its grid, ties to even.

    Equal to casting there and back, which has no vector code on CPU and takes three times as long: adding and
    subtracting 1.5 * 2^(e + 23 - mantissa bits) makes fp32 round at the last FP8 digit of a value with exponent e.
    """
    mantissa_bits, min_exponent = _GRIDS[dtype]
    exponent = y.view(torch.int32).bitwise_and(0x7F800000).clamp_min_((127 + min_exponent) << 23)
    anchor = exponent.add_(((23 - mantissa_bits) << 23) | 0x400000).view(torch.float32)
    return (y + anchor).sub_(anchor)


class _LastRounded:
    """Rounds to E4M3 and remembers the last result, for as long as that tensor lives unchanged."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        last = self._last
        if last is not None and last[0]() is x and last[1] == x._version:
            return last[2]
        x8 = round_to_fp8(x.detach(), E4M3)
        self._last = (weakref.ref(x), x._version, x8)
        return x8


# Query, key and value take one input, gate and up another: each is rounded once.
_rounded_input = _LastRounded()


class _Fp8Product(torch.autograd.Function):
    """`x @ weight.T` with all three products of training on FP8-rounded operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, x8: Tensor, weight8: Tensor) -> Tensor:
        ctx.save_for_backward(x8, weight8)
        return x8 @ weight8.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x8, weight8 = ctx.saved_tensors
        grad8 = round_to_fp8(grads[0], E5M2)
        grad_x = grad8 @ weight8 if ctx.needs_input_grad[0] else None
        grad_weight = grad8.flatten(0, -2).t() @ x8.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None


class Fp8Linear(nn.Linear):
    """A linear layer that computes in emulated FP8 while training, and as usual in evaluation mode.

    Parameters keep their names and wide values, so checkpoints are those of `nn.Linear`.
    """

    _rounded_frozen: _LastRounded

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Fp8Linear:
        """Build a layer that shares the parameters of `linear`."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear._parameters["bias"] is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._rounded_frozen = _LastRounded()
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if not self.training:
            return super().forward(input)
        # Only a frozen weight is remembered: optimizers may write through `.data`, which leaves no new version.
        trained = self.weight.requires_grad
        weight8 = round_to_fp8(self.weight.detach(), E4M3) if trained else self._rounded_frozen(self.weight)
        y = cast("Tensor", _Fp8Product.apply(input, self.weight, _rounded_input(input), weight8))
        return y if self._parameters["bias"] is None else y + self.bias


def convert_linears(module: nn.Module, *, min_features: int) -> int:
    """Replace the linear layers below `module` by `Fp8Linear`.

    Args:
        module: Usually the decoder; its language-model head is left out by not being below it.
        min_features: Layers whose smaller side is below this stay as they are.

    Returns:
        How many layers were replaced.
    """
    count = 0
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and min(child.in_features, child.out_features) >= min_features:
                setattr(parent, name, Fp8Linear.from_linear(child))
                count += 1
    return count
