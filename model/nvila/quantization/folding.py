"""Moving a scale from one layer's input channels into the layer before: the product stays, the weights change.

AWQ (arXiv 2306.00978) uses it to spare weights that matter, SmoothQuant (arXiv 2211.10438) to take outliers out of
activations. A fold is exact only where nothing between both layers mixes channels; `folds_of` knows such places in the
blocks of SigLIP towers and of decoders with the usual names, and callers verify each fold on real inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nvila.quantization.schemes import row_chunks


@dataclass(frozen=True, slots=True)
class Fold:
    """A place where a scale can move.

    Args:
        before: Name of the norm or linear layer whose output the scale divides.
        after: Names of the linear layers that read it, whose input columns the scale multiplies.
        repeat: Query heads that read one head of keys and values: `before` then has that many times fewer channels
            than `after` reads.
        head_size: Channels of a head; only read when heads repeat.
    """

    before: str
    after: tuple[str, ...]
    repeat: int = 1
    head_size: int = 1

    def spread(self, scale_C: Tensor) -> Tensor:
        """Return the scale of every input of `after`, given that of every output of `before`."""
        if self.repeat == 1:
            return scale_C
        return scale_C.view(-1, 1, self.head_size).expand(-1, self.repeat, -1).reshape(-1)

    def gather(self, values_I: Tensor) -> Tensor:
        """Return a statistic for every output of `before`: the mean over the heads that read it."""
        if self.repeat == 1:
            return values_I
        return values_I.view(-1, self.repeat, self.head_size).mean(1).reshape(-1)


_DECODER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
# As the reference does: only behind the norms. The heads' outputs and the activation function stay unsmoothed.
_TOWER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("layer_norm1", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("layer_norm2", ("mlp.fc1",)),
)


def folds_of(block: nn.Module) -> tuple[Fold, ...]:
    """Return the folds of a block whose layers have names that are known; none of another block."""
    modules = dict(block.named_modules())
    folds = []
    for before, after in (*_DECODER, *_TOWER):
        if before not in modules or not all(isinstance(modules.get(name), nn.Linear) for name in after):
            continue
        repeat, head_size = 1, 1
        if before == "self_attn.v_proj":
            outputs, inputs = modules[before].out_features, modules[after[0]].in_features
            head_size = int(getattr(modules["self_attn"], "head_dim", 0) or 0)
            if inputs % outputs or (inputs != outputs and (not head_size or outputs % head_size)):
                continue
            repeat = inputs // outputs
        folds.append(Fold(before, after, repeat, head_size))
    return tuple(folds)


@torch.no_grad()
def apply_fold(block: nn.Module, fold: Fold, scale_C: Tensor) -> None:
    """Divide the outputs of `before` by a scale (C) and multiply the inputs of `after` by it, in place.

    Folding with the reciprocal undoes it, but for rounding.
    """
    before = block.get_submodule(fold.before)
    for parameter in (before.weight, getattr(before, "bias", None)):
        if isinstance(parameter, Tensor):
            # In the weights' own type: a copy of them in fp32 would be twice as large.
            parameter.div_(scale_C.to(parameter.dtype).view(-1, *[1] * (parameter.dim() - 1)))
    columns = fold.spread(scale_C)
    for name in fold.after:
        weight = block.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        for part in row_chunks(weight):
            part.copy_((part.float() * columns).to(weight.dtype))


def fold_weights(block: nn.Module, fold: Fold) -> list[Tensor]:
    """Return what a fold changes, for `restore_fold`; the tensors themselves, not copies."""
    before = block.get_submodule(fold.before)
    found = [before.weight, getattr(before, "bias", None), *(block.get_submodule(name).weight for name in fold.after)]
    return [parameter.detach() for parameter in found if isinstance(parameter, Tensor)]


@torch.no_grad()
def restore_fold(block: nn.Module, fold: Fold, saved: Sequence[Tensor]) -> None:
    """Put back copies of what `fold_weights` returned."""
    for parameter, value in zip(fold_weights(block, fold), saved, strict=True):
        parameter.copy_(value)
