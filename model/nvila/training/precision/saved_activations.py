"""Activations that autograd keeps for the backward pass, in FP8 (COAT, arXiv 2410.19313, section 5).

A norm, and the SiLU and product of an MLP, keep their inputs as E4M3 codes with one scale for 16 elements of the last
axis, and compute what else their gradients need from those. A linear layer keeps its input with one scale a tensor.
Attention and rotary embedding keep theirs as they are. The forward pass is untouched; the backward pass sees rounded
activations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(E4M3).max
_TINY = 1e-10
GROUP_SIZE = 16


@dataclass(slots=True, weakref_slot=True)
class PackedActivation:
    """An activation as FP8 codes.

    Args:
        codes: Groups (..., groups, E), or the tensor itself where one scale serves all.
        scale: bf16 (..., groups, 1), or one fp32 number.
        shape: Of the activation.
        dtype: Of the activation.
    """

    codes: Tensor
    scale: Tensor
    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale))

    def unpack(self) -> Tensor:
        """Return the activation as the backward pass sees it."""
        wide = self.codes.to(torch.float32) * self.scale
        if self.scale.dim():
            wide = wide.flatten(-2)[..., : self.shape[-1]]
        return wide.to(self.dtype).reshape(self.shape)


def pack_groups(x: Tensor, group_size: int = GROUP_SIZE) -> PackedActivation:
    """Round to E4M3 with one scale for every `group_size` elements of the last axis."""
    wide = x.detach().float()
    grouped = pad(wide, (0, -x.shape[-1] % group_size)).unflatten(-1, (-1, group_size))
    scale = ((grouped.abs().amax(-1, keepdim=True) + _TINY) / _LARGEST).bfloat16()
    # The scale was rounded, perhaps down.
    codes = (grouped / scale.float()).clamp_(-_LARGEST, _LARGEST).to(E4M3)
    return PackedActivation(codes=codes, scale=scale, shape=x.shape, dtype=x.dtype)


def pack_tensor(x: Tensor) -> PackedActivation:
    """Round to E4M3 with one scale; exact for what `round_to_fp8` returned."""
    wide = x.detach().float()
    scale = (wide.abs().amax() + _TINY) / _LARGEST
    return PackedActivation(
        codes=(wide / scale).clamp_(-_LARGEST, _LARGEST).to(E4M3), scale=scale, shape=x.shape, dtype=x.dtype
    )


class _FromFp8(torch.autograd.Function):
    """Runs a function, keeps its inputs in FP8, and runs it again on those to get gradients."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], group_size: int, num_inputs: int, *tensors: Tensor
    ) -> Tensor:
        ctx.function, ctx.parameters = function, tensors[num_inputs:]
        ctx.packed = [pack_groups(x, group_size) for x in tensors[:num_inputs]]
        return function(*tensors[:num_inputs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        inputs = [packed.unpack().requires_grad_() for packed in ctx.packed]
        with torch.enable_grad():
            output = ctx.function(*inputs)
        sources = [x for x, need in zip([*inputs, *ctx.parameters], needed, strict=True) if need]
        found = iter(torch.autograd.grad(output, sources, grads[0]))
        return (None, None, None, *(next(found) if need else None for need in needed))


class _LinearInputs:
    """Keeps the inputs of linear layers in FP8; a tensor that several layers take is kept once."""

    def __init__(self) -> None:
        # Of a live tensor: its version when it was packed, and the result for as long as autograd holds it.
        self._packed: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def context(self) -> AbstractContextManager[Any]:
        """Return the context for the forward pass of a linear layer."""
        return saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, x: Tensor) -> Any:
        # A weight is there anyway.
        if not x.is_floating_point() or _is_weight(x):
            return x
        version, reference = self._packed.get(x, (None, None))
        packed = reference() if reference is not None and version == x._version else None
        if packed is None:
            packed = pack_tensor(x)
            self._packed[x] = (x._version, weakref.ref(packed))
        return packed


_linear_inputs = _LinearInputs()


class _Fp8Saving(nn.Module):
    """Base of the layers below: a subclass of it and of a layer's class takes the place of that class."""

    _group_size: int

    def _saves(self) -> bool:
        return self.training and torch.is_grad_enabled()


class _SavingLinear(_Fp8Saving):
    def forward(self, input: Tensor) -> Tensor:
        with _linear_inputs.context() if self._saves() else nullcontext():
            return cast("Tensor", super().forward(input))


class _SavingNorm(_Fp8Saving):
    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = super().forward
        if not self._saves():
            return cast("Tensor", wide(hidden_states))
        return _from_fp8(wide, self._group_size, [hidden_states], list(self.parameters()))


class _SavingMlp(_Fp8Saving):
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not self._saves():
            return cast("Tensor", super().forward(x))
        product = _from_fp8(self._gated, self._group_size, [self.gate_proj(x), self.up_proj(x)], [])
        return cast("Tensor", self.down_proj(product))

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return cast("Tensor", self.act_fn(gate)) * up


def save_in_fp8(decoder: nn.Module, group_size: int = GROUP_SIZE) -> int:
    """Let the layers of a decoder keep their activations in FP8 while they train, in place.

    Parameters, names and `isinstance` stay what they are: a layer's class is replaced by a subclass of itself.

    Args:
        decoder: Its norms, gated MLPs and linear layers are found by their kind.
        group_size: Elements that share a scale where an operation is no matrix product.

    Returns:
        How many modules were prepared.
    """
    count = 0
    for module in decoder.modules():
        saving = _saving_class(module)
        if saving is not None and not isinstance(module, _Fp8Saving):
            module.__class__ = type(f"Saving{type(module).__name__}", (saving, type(module)), {})
            cast("_Fp8Saving", module)._group_size = group_size
            count += 1
    return count


def _saving_class(module: nn.Module) -> type[_Fp8Saving] | None:
    if isinstance(module, nn.Linear):
        return _SavingLinear
    if type(module).__name__.endswith("Norm"):
        return _SavingNorm
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return _SavingMlp
    return None


def _from_fp8(
    function: Callable[..., Tensor], group_size: int, inputs: Sequence[Tensor], parameters: Sequence[Tensor]
) -> Tensor:
    return cast("Tensor", _FromFp8.apply(function, group_size, len(inputs), *inputs, *parameters))


def _is_weight(x: Tensor) -> bool:
    return isinstance(x if x._base is None else x._base, nn.Parameter)


def _unpack(packed: Any) -> Tensor:
    return packed.unpack() if isinstance(packed, PackedActivation) else packed
