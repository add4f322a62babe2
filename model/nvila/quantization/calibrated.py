"""Quantize a part block by block, with what calibration samples show of its inputs.

Each block sees inputs that went through the blocks before it as they are quantized. Only one block is worked on at a
time; the samples' hidden states lie in mapped files, so that memory stays under the wide model and one block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from nvila.progress import SILENT, Reporter
from nvila.quantization.config import Scheme
from nvila.quantization.folding import Fold, apply_fold, fold_weights, folds_of, restore_fold
from nvila.quantization.scales import awq_scale, clip_weight, smooth_scale
from nvila.quantization.schemes import quantize_linears, quantized_rows
from nvila.quantization.statistics import InputStatistics, watching_inputs

if TYPE_CHECKING:
    from nvila.quantization.resume import PartStates

# Clipping these moves attention scores, which depend on products of two rounded layers (as in llm-awq).
_UNCLIPPED = ("q_proj", "k_proj")
_FOLD_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """What rounding does to one linear layer on calibration inputs.

    Args:
        name: Layer in the part.
        error: Distance of its outputs from the wide layer's, relative to their size.
        rounded: The same when the weights are rounded to nearest as they are.
        folded: Whether its inputs were scaled.
        clipped: Share of its groups whose range was shrunk.
    """

    name: str
    error: float
    rounded: float
    folded: bool = False
    clipped: float = 0.0


@dataclass(frozen=True, slots=True)
class Spill:
    """Keeps tensors in files of a scratch folder, not in memory.

    The files have no name any more once they are mapped, so nothing is left behind, whatever happens.
    """

    folder: Path

    def keep(self, value: Tensor) -> Tensor:
        """Return a copy of a tensor that is mapped to a file; tensors of other devices are copied where they are."""
        if value.device.type != "cpu" or not value.numel():
            return value.detach().clone()
        path = self.folder / f"{uuid4().hex}.states"
        kept = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype).view(value.shape)
        path.unlink()
        return kept.copy_(value.detach())


@dataclass(slots=True)
class BlockInputs:
    """Hidden states of all samples in front of a block, and the other arguments of its call.

    Args:
        spill: Keeps what is large.
        hidden: One tensor a sample, spilled, replaced in place block by block.
        arguments: Keyword arguments of each sample's call; samples of one length share them.
        positional: Arguments behind the hidden states.
    """

    spill: Spill
    hidden: list[Tensor]
    arguments: list[Mapping[str, Any]]
    positional: tuple[Any, ...] = ()

    @property
    def num_rows(self) -> int:
        """Positions of all samples."""
        return sum(one.numel() // one.shape[-1] for one in self.hidden)

    def run(self, block: nn.Module, index: int) -> Tensor:
        """Run a block on one sample."""
        out = block(self.hidden[index], *self.positional, **self.arguments[index])
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


@torch.no_grad()
def quantize_blocks(
    blocks: Sequence[nn.Module],
    inputs: BlockInputs,
    scheme: Scheme,
    group_size: int,
    *,
    reporter: Reporter = SILENT,
    phase: str = "quantize",
    alpha: float = 0.5,
    states: PartStates | None = None,
) -> list[LayerError]:
    """Quantize blocks in place, in order: SmoothQuant for `w8a8`, AWQ for `w4a16`, rounding for the others.

    Args:
        blocks: Blocks of one part; the output of each is the input of the next.
        inputs: What the first one reads. Replaced by what the last one returns.
        scheme: Not `none`.
        group_size: Input channels that share a 4-bit scale.
        reporter: Receives progress in blocks.
        phase: Name of the progress.
        alpha: Strength of SmoothQuant.
        states: Blocks that an interrupted run has finished, and where those of this one are kept.

    Returns:
        The error of every linear layer.
    """
    errors: list[LayerError] = []
    taken_over = 0
    for number, block in enumerate(blocks):
        reporter.progress(phase, number, len(blocks))
        found = None if states is None else states.load(number, block, reporter)
        if found is None:
            where = f"{phase}: block {number}"
            found = _quantize_block(block, inputs, scheme, group_size, alpha, reporter, where)
            if states is not None:
                states.save(number, block, found)
        else:
            taken_over += 1
        errors += [LayerError(**{**_fields(one), "name": f"{number}.{one.name}"}) for one in found]
        for index in range(len(inputs.hidden)):
            inputs.hidden[index].copy_(inputs.run(block, index))
    reporter.progress(phase, len(blocks), len(blocks))
    if taken_over:
        reporter.notice(f"{phase}: {taken_over} finished blocks of an interrupted run are used")
    return errors


def _quantize_block(
    block: nn.Module,
    inputs: BlockInputs,
    scheme: Scheme,
    group_size: int,
    alpha: float,
    reporter: Reporter,
    where: str,
) -> list[LayerError]:
    layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}

    def make() -> InputStatistics:
        return InputStatistics(group_size if scheme == "w4a16" else None, inputs.num_rows)

    with watching_inputs(layers, make) as statistics:
        for index in range(len(inputs.hidden)):
            inputs.run(block, index)
    wide = {name: layers[name](statistics[name].rows) for name in statistics}
    rounded = {
        name: _error_when_rounded(layers[name], statistics[name], wide[name], scheme, group_size) for name in wide
    }
    scales, shrunk = _fold_block(block, inputs, statistics, scheme, group_size, alpha, reporter, where)
    clipped: dict[str, float] = {}
    if scheme == "w4a16":
        for name in statistics:
            if not name.endswith(_UNCLIPPED):
                gram = _scaled_gram(statistics[name], scales.get(name), group_size)
                clipped[name] = clip_weight(layers[name].weight, gram, group_size)
    quantize_linears(block, scheme, group_size)

    def error(name: str) -> float:
        found = block.get_submodule(name)(_scaled(statistics[name].rows, scales.get(name)))
        return _distance(found.float() * shrunk.get(name, 1.0), wide[name])

    return [
        LayerError(
            name=name,
            error=error(name),
            rounded=rounded[name],
            folded=name in scales,
            clipped=clipped.get(name, 0.0),
        )
        for name in wide
    ]


def _fold_block(
    block: nn.Module,
    inputs: BlockInputs,
    statistics: Mapping[str, InputStatistics],
    scheme: Scheme,
    group_size: int,
    alpha: float,
    reporter: Reporter,
    where: str,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fold what helps.

    Returns:
        By layer, what its inputs are divided by now; and what its outputs are divided by.
    """
    scales: dict[str, Tensor] = {}
    shrunk: dict[str, Tensor] = {}
    if scheme not in ("w8a8", "w4a16") or not inputs.hidden:
        return scales, shrunk
    folds = folds_of(block)
    if not folds:
        reporter.notice(f"{where} has layers of unknown names: rounded to nearest without scaling")
        return scales, shrunk
    before = inputs.run(block, 0)
    for fold in folds:
        scale = _search(block, fold, statistics, scheme, group_size, alpha)
        if scale is None:
            continue
        saved = [inputs.spill.keep(weight) for weight in fold_weights(block, fold)]
        apply_fold(block, fold, scale)
        if _distance(inputs.run(block, 0), before) > _FOLD_TOLERANCE:
            restore_fold(block, fold, saved)
            reporter.notice(f"{where}: a scale cannot move into {fold.before} of this family; left as it was")
            continue
        scales |= dict.fromkeys(fold.after, fold.spread(scale))
        shrunk[fold.before] = scale
    return scales, shrunk


def _search(
    block: nn.Module,
    fold: Fold,
    statistics: Mapping[str, InputStatistics],
    scheme: Scheme,
    group_size: int,
    alpha: float,
) -> Tensor | None:
    if any(name not in statistics for name in fold.after):
        return None
    seen = statistics[fold.after[0]]
    weights = [block.get_submodule(name).weight for name in fold.after]
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]
    if scheme == "w4a16":
        return awq_scale(fold, tensors, seen.mean_abs, seen.rows, group_size)[0]
    if fold.repeat != 1 or not fold.before.rpartition(".")[2].startswith(("layer_norm", "input_layer", "post_att")):
        return None
    assert seen.max_abs is not None
    return smooth_scale(tensors, seen.max_abs, alpha)


def _error_when_rounded(
    layer: nn.Linear, statistics: InputStatistics, wide: Tensor, scheme: Scheme, group_size: int
) -> float:
    pieces = [linear(statistics.rows, rows) for rows in quantized_rows(layer.weight.detach(), scheme, group_size)]
    out = torch.cat(pieces, -1)
    bias: Tensor | None = layer.bias
    return _distance(out if bias is None else out + bias, wide)


def _scaled(rows: Tensor, scale: Tensor | None) -> Tensor:
    return rows if scale is None else (rows.float() / scale).to(rows.dtype)


def _scaled_gram(statistics: InputStatistics, scale: Tensor | None, group_size: int) -> Tensor:
    gram = statistics.gram
    assert gram is not None
    if scale is None:
        return gram
    by_group = scale.view(-1, group_size)
    return gram / (by_group.unsqueeze(1) * by_group.unsqueeze(2))


def _distance(found: Tensor, expected: Tensor) -> float:
    size = float(expected.float().norm())
    return float((found.float() - expected.float()).norm()) / size if size else 0.0


def _fields(error: LayerError) -> dict[str, Any]:
    return {name: getattr(error, name) for name in error.__slots__}
