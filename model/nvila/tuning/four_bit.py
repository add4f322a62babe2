"""A frozen linear layer in 4 bits, for QLoRA (Dettmers et al., arXiv 2305.14314) where bitsandbytes cannot run.

Values are those of `nvila quantize`: torchao's asymmetric 4-bit groups along the inputs. They stay packed, two to a
byte, and are widened for one product at a time, in the backward pass too: torch would otherwise keep the wide weights
of all layers from the forward pass to the backward pass, and nothing would be saved. In training the layers of a model
are widened into one buffer: fresh memory for each would lie scattered among the saved activations, and the heap would
grow by far more than what is live.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nvila.errors import CapabilityError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.quantization.quantize import INT4
from nvila.quantization.saved import pack_nibbles, unpack_nibbles

GROUP_SIZES = (128, 64, 32, 16)
FourBitKind = Literal["nf4", "int4"]
KINDS: tuple[FourBitKind, ...] = get_args(FourBitKind)
# Numbers that are widened at a time: what unpacking needs besides is a few times as many bytes.
_AT_ONCE = 2**20
_WITHOUT_VALUES: ContextVar[bool] = ContextVar("without_values", default=False)


class WideBuffer:
    """Memory for one wide layer, used again for the next one."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def of(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor (out, in) whose values are of no meaning, valid until the next call."""
        rows, columns = codes.shape[0], 2 * codes.shape[1]
        kept = self._kept
        if kept is None or (kept.dtype, kept.device) != (dtype, codes.device) or kept.numel() < rows * columns:
            self._kept = kept = torch.empty(rows * columns, dtype=dtype, device=codes.device)
        return kept[: rows * columns].view(rows, columns)


class FourBitLinear(nn.Linear):
    """A linear layer whose weight is packed 4-bit codes; it passes gradients on and learns nothing.

    Args:
        codes: Packed values, uint8 of shape (out, in / 2).
        scale: Of every group, (out, groups).
        zero: Code that stands for 0, (out, groups).
        bias: Bias (out), if any.
        buffer: Where it is widened in training; layers that are used one after the other share it.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, buffer: WideBuffer) -> None:
        # Not that of nn.Linear, which would make a wide weight.
        nn.Module.__init__(self)
        self.out_features, self.in_features = codes.shape[0], 2 * codes.shape[1]
        self.buffer = buffer
        for name, value in (("codes", codes), ("scale", scale), ("zero", zero)):
            self.register_buffer(name, value)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # made when it is asked for
        """The wide weight (out, in), made anew; under `without_values` a stand-in that takes no memory."""
        if _WITHOUT_VALUES.get():
            return self.scale.new_zeros(()).expand(self.out_features, self.in_features)
        return _widen(self.codes, self.scale, self.zero)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if torch.is_grad_enabled() and input.requires_grad:
            out = cast("Tensor", _FourBitProduct.apply(input, self.codes, self.scale, self.zero, self.buffer))
        else:
            # Nothing is saved that fresh memory could lie between, and threads that serve share no buffer.
            out = F.linear(input, self.weight.to(input.dtype))
        bias = cast("Tensor | None", self.bias)
        return out if bias is None else out + bias.to(out.dtype)

    def widened(self) -> nn.Linear:
        """Return an ordinary layer of the same values."""
        with torch.device("meta"):
            wide = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        wide.weight = nn.Parameter(self.weight, requires_grad=False)
        wide.bias = self.bias
        return wide

    def extra_repr(self) -> str:
        """Return the shape."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits=4"


@contextmanager
def without_values() -> Iterator[None]:
    """Let `weight` of 4-bit layers have shape, dtype and device alone: who adds adapters asks for it many times."""
    token = _WITHOUT_VALUES.set(True)
    try:
        yield
    finally:
        _WITHOUT_VALUES.reset(token)


class _FourBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, buffer: WideBuffer) -> Tensor:
        ctx.save_for_backward(codes, scale, zero)
        ctx.buffer = buffer
        return F.linear(x, _widen(codes, scale, zero, buffer.of(codes, x.dtype)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, zero = ctx.saved_tensors
        return grads[0] @ _widen(codes, scale, zero, ctx.buffer.of(codes, grads[0].dtype)), None, None, None, None


def _widen(codes: Tensor, scale: Tensor, zero: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the wide values of packed codes, in `out` where it is given."""
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    wide = torch.empty(rows, columns, dtype=scale.dtype, device=codes.device) if out is None else out
    step = max(1, _AT_ONCE // columns)
    for start in () if codes.is_meta else range(0, rows, step):
        part = slice(start, start + step)
        values = unpack_nibbles(codes[part]).to(scale.dtype).unflatten(1, (scale.shape[1], -1))
        wide[part] = values.sub_(zero[part].unsqueeze(2)).mul_(scale[part].unsqueeze(2)).flatten(1)
    return wide


def group_size(width: int) -> int | None:
    """Return the largest usable group for layers of so many inputs; None where there is none.

    Example:
        >>> group_size(3584), group_size(96)
        (128, 32)
    """
    return next((size for size in GROUP_SIZES if width % size == 0), None)


def check_four_bit(language: Any) -> None:
    """Check, from the configuration of a decoder alone, that its layers can be kept in 4 bits.

    Raises:
        CapabilityError: They cannot.
    """
    for name in ("hidden_size", "intermediate_size"):
        width = int(getattr(language, name, 0) or 0)
        if width and group_size(width) is None:
            raise CapabilityError(
                f"language=qlora: {name} {width} is no multiple of {GROUP_SIZES[-1]}, so no 4-bit kernel takes it",
                "use language=lora",
            )


def kind_on(device: torch.device) -> FourBitKind:
    """Return the 4-bit values that a device keeps: bitsandbytes' NF4 on a GPU, integers in groups elsewhere."""
    return "nf4" if device.type == "cuda" else "int4"


def kind_in(model: nn.Module) -> FourBitKind | None:
    """Return the 4-bit values that a model holds; None if it holds none."""
    for child in model.modules():
        if isinstance(child, FourBitLinear):
            return "int4"
        if _is_nf4(child):
            return "nf4"
    return None


def to_four_bit(model: NVILAForConditionalGeneration) -> int:
    """Keep the linear layers of the language model in 4 bits, in place; the head stays as it is.

    On a GPU that is bitsandbytes' NF4 with double quantization, elsewhere `FourBitLinear`.

    Returns:
        How many layers were changed.

    Raises:
        CapabilityError: There is no kernel for a layer, or bitsandbytes is missing on a GPU.
    """
    decoder = cast("nn.Module", model.model.language_model)
    names = [name for name, child in decoder.named_modules() if type(child) is nn.Linear]
    buffer = WideBuffer()
    for name in names:
        layer = cast("nn.Linear", decoder.get_submodule(name))
        made = _nf4_layer(layer) if kind_on(layer.weight.device) == "nf4" else four_bit_layer(layer, buffer)
        parent, _, own = name.rpartition(".")
        setattr(decoder.get_submodule(parent), own, made)
    return len(names)


def four_bit_layer(layer: nn.Linear, buffer: WideBuffer | None = None) -> FourBitLinear:
    """Quantize a linear layer; on the meta device only its shape is made.

    Args:
        layer: The layer, whose weight is given up.
        buffer: That of other layers of the model; None makes one.

    Raises:
        CapabilityError: No 4-bit kernel takes its width.
    """
    buffer = WideBuffer() if buffer is None else buffer
    size = group_size(layer.in_features)
    if size is None:
        raise CapabilityError(
            f"language=qlora: a layer of {layer.in_features} inputs has no 4-bit kernel", "use language=lora"
        )
    bias, groups = layer.bias, layer.in_features // size
    if layer.weight.is_meta:
        shape = (layer.out_features, groups)
        codes = torch.empty(layer.out_features, layer.in_features // 2, dtype=torch.uint8, device="meta")
        scale, zero = (torch.empty(shape, dtype=layer.weight.dtype, device="meta") for _ in range(2))
        return FourBitLinear(codes, scale, zero, bias, buffer)
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
    from torchao.quantization.granularity import PerGroup

    holder = nn.Sequential(layer)
    quantize_(
        holder,
        IntxWeightOnlyConfig(weight_dtype=INT4, granularity=PerGroup(size), mapping_type=MappingType.ASYMMETRIC),
        filter_fn=lambda module, _: isinstance(module, nn.Linear),
    )
    quantized: Any = cast("nn.Linear", holder[0]).weight
    shape = (layer.out_features, groups)
    scale, zero = quantized.scale.reshape(shape), quantized.zero_point.reshape(shape)
    return FourBitLinear(
        pack_nibbles(quantized.qdata), scale.contiguous(), zero.to(scale.dtype).contiguous(), bias, buffer
    )


def widen_model(model: nn.Module) -> int:
    """Put ordinary layers in the place of all that hold 4 bits; returns how many there were."""
    found = [
        (name, child) for name, child in model.named_modules() if isinstance(child, FourBitLinear) or _is_nf4(child)
    ]
    for name, child in found:
        parent, _, own = name.rpartition(".")
        wide = child.widened() if isinstance(child, FourBitLinear) else _widened_nf4(child)
        setattr(model.get_submodule(parent), own, wide)
    return len(found)


def _is_nf4(module: nn.Module) -> bool:
    # By name: bitsandbytes takes seconds to import, and is not there on most machines.
    return type(module).__name__ == "Linear4bit"


def _widened_nf4(layer: Any) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit

    with torch.device("meta"):
        wide = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    wide.weight = nn.Parameter(weight, requires_grad=False)
    wide.bias = layer.bias
    return wide


def _nf4_layer(layer: nn.Linear) -> nn.Module:
    try:
        import bitsandbytes as bnb
    except ImportError as e:
        raise CapabilityError(
            "language=qlora on a GPU needs bitsandbytes, which is not installed",
            "pip install 'nvila[tune-gpu]', or use language=lora",
        ) from e
    made = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
    )
    made.weight = bnb.nn.Params4bit(
        layer.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
    )
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    moved: nn.Module = made.to(layer.weight.device)  # which quantizes
    return moved
