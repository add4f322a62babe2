"""Cross entropy of a language-model head that never holds the logits of a whole batch.

With a vocabulary of 150k the logits of 4k tokens take 2.5 GB in fp32, and their gradient as much again. Here both
exist for a few tokens at a time: a chunk's logits are made, turned into their own gradient in place, multiplied into
the gradients of the hidden states and of the head, and forgotten.

Shape suffixes: M tokens, c tokens of a chunk, H width, V vocabulary, K ids that share probability (time tokens).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nvila.errors import ConfigError

Reduction = Literal["none", "mean", "sum"]

IGNORE_INDEX = -100
# Logits below this many elements are made at once: one product beats several, and 64 MiB is little.
WHOLE_LOGITS = 2**24
_REDUCTIONS = ("none", "mean", "sum")
_CHUNK_ELEMENTS = 2**25  # 128 MiB of fp32 logits: small beside a head, and its gradient is added to less often


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """Ids whose targets are a distribution over each other instead of one id.

    Args:
        ids: (K,) the ids, none twice.
        weights: (K, K) in fp32; row k is the target distribution of `ids[k]` over `ids` and sums to 1.
    """

    ids: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> SoftTargets:
        """Return the same targets on a device."""
        return SoftTargets(self.ids.to(device), self.weights.to(device))

    def rows(self, targets_M: Tensor) -> Tensor:
        """Return the distribution (M, K) of every target; all zero for a target that is one id only."""
        return (targets_M.unsqueeze(1) == self.ids).to(self.weights.dtype) @ self.weights


def chunked_cross_entropy(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    targets_M: Tensor,
    *,
    chunk_tokens: int | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = IGNORE_INDEX,
    soft: SoftTargets | None = None,
) -> Tensor:
    """Cross entropy of `hidden @ weight.T` against `targets`, in memory of one chunk of logits.

    Equal to `torch.nn.functional.cross_entropy` on the full fp32 logits up to rounding. For "mean" and "sum" the
    gradients are made along with the loss, so that no product is computed twice; such a loss can be differentiated
    once. "none" computes the logits again in the backward pass.

    Args:
        hidden_MH: Hidden states, of which row i predicts target i; shift them first.
        weight_VH: Weight of the head.
        targets_M: Target ids; `ignore_index` takes a row out.
        chunk_tokens: Tokens whose logits exist at a time; by default as many as fill 128 MiB in fp32.
        reduction: "mean" over the rows that count (0 if there are none), "sum", or "none" for one fp32 value a row,
            0 where ignored.
        ignore_index: Target of the rows that do not count.
        soft: Ids with soft targets: the LITA-style soft cross entropy of time tokens.

    Returns:
        The loss in fp32: a scalar, or (M,) for "none".

    Raises:
        ConfigError: `reduction` is unknown or `chunk_tokens` is below 1.
    """
    chunk = _chunk_size(chunk_tokens, weight_VH.shape[0], reduction)
    keep_M = targets_M != ignore_index
    targets_kept = targets_M[keep_M]
    soft = soft.to(targets_M.device) if soft is not None else None
    hidden_kept, weight_VH = _in_compute_dtype(hidden_MH[keep_M], weight_VH)
    if reduction == "none":
        if len(targets_kept) <= chunk:  # holding the logits is cheaper than making them twice
            nll = token_nll(hidden_kept @ weight_VH.T, targets_kept, soft)
        else:
            nll = cast("Tensor", _RecomputedNll.apply(hidden_kept, weight_VH, targets_kept, soft, chunk))
        return nll.new_zeros(len(targets_M)).masked_scatter(keep_M, nll)
    scale = 1 / max(1, len(targets_kept)) if reduction == "mean" else 1.0
    differentiable = torch.is_grad_enabled()
    total = _ScalarNll.apply(hidden_kept, weight_VH, targets_kept, soft, chunk, scale, differentiable)
    return cast("Tensor", total)


def head_cross_entropy(
    head: nn.Module,
    hidden_MH: Tensor,
    targets_M: Tensor,
    *,
    chunk_tokens: int | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = IGNORE_INDEX,
    soft: SoftTargets | None = None,
) -> Tensor:
    """Cross entropy through a language-model head of any kind.

    A plain linear head goes the short way of `chunked_cross_entropy`. Any other (with adapters, quantized, with a
    bias, with hooks that fetch its weights) is called chunk by chunk and again in the backward pass.

    Args:
        head: Maps hidden states (c, H) to logits (c, V).
        hidden_MH: As for `chunked_cross_entropy`, as are the arguments below.
        targets_M: Target ids.
        chunk_tokens: Tokens of a chunk; for a head without a weight of its own 128.
        reduction: "mean", "sum" or "none".
        ignore_index: Target of the rows that do not count.
        soft: Ids with soft targets.

    Returns:
        The loss in fp32: a scalar, or (M,) for "none".

    Raises:
        ConfigError: `reduction` is unknown or `chunk_tokens` is below 1.
    """
    if _is_plain_linear(head):
        return chunked_cross_entropy(
            hidden_MH,
            cast("Tensor", head.weight),
            targets_M,
            chunk_tokens=chunk_tokens,
            reduction=reduction,
            ignore_index=ignore_index,
            soft=soft,
        )
    chunk = _chunk_size(chunk_tokens, int(getattr(head, "out_features", _CHUNK_ELEMENTS // 128)), reduction)
    keep_M = targets_M != ignore_index
    soft = soft.to(targets_M.device) if soft is not None else None

    def chunk_nll(hidden_cH: Tensor, targets_c: Tensor) -> Tensor:
        return token_nll(head(hidden_cH), targets_c, soft)

    hidden_kept, targets_kept = hidden_MH[keep_M], targets_M[keep_M]
    calls = -(-len(targets_kept) // chunk)
    if calls_must_agree(head):
        calls = _agreed_calls(calls, hidden_MH.device)
    pieces = [
        cast("Tensor", checkpoint(chunk_nll, hidden_kept[start:end], targets_kept[start:end], use_reentrant=False))
        for start, end in ((number * chunk, (number + 1) * chunk) for number in range(max(1, calls)))
    ]
    nll = torch.cat(pieces)
    if reduction == "none":
        return nll.new_zeros(len(targets_M)).masked_scatter(keep_M, nll)
    return nll.sum() / max(1, len(nll)) if reduction == "mean" else nll.sum()


def token_nll(logits_MV: Tensor, targets_M: Tensor, soft: SoftTargets | None = None) -> Tensor:
    """Negative log-likelihood of every target from logits that are at hand.

    Args:
        logits_MV: Logits of any floating type.
        targets_M: Target ids, none of them ignored.
        soft: Ids with soft targets.

    Returns:
        (M,) in fp32.
    """
    logits_MV = logits_MV.float()
    if soft is None:
        return nn.functional.cross_entropy(logits_MV, targets_M, reduction="none")
    return logits_MV.logsumexp(1) - _target_logits(logits_MV, targets_M, soft)


def supervised_nll(head: nn.Module, hidden_BLH: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every supervised token.

    Args:
        head: Maps hidden states to logits.
        hidden_BLH: Hidden states; position i predicts the label at i + 1.
        labels_BL: Target ids, or -100 where nothing is supervised.

    Returns:
        The likelihoods in fp32, one for each supervised label in row-major order, and the (B, L) mask of the labels
        they belong to.
    """
    mask_BL = labels_BL != IGNORE_INDEX
    mask_BL[:, 0] = False
    hidden_MH, targets_M = hidden_BLH[:, :-1][mask_BL[:, 1:]], labels_BL[mask_BL]
    if len(targets_M) * int(getattr(head, "out_features", WHOLE_LOGITS)) <= WHOLE_LOGITS:
        return token_nll(head(hidden_MH), targets_M), mask_BL
    return head_cross_entropy(head, hidden_MH, targets_M, reduction="none"), mask_BL


def _target_logits(logits_cV: Tensor, targets_c: Tensor, soft: SoftTargets | None) -> Tensor:
    """Logit of each target; the expected one where the target is a distribution."""
    hard_c = logits_cV.gather(1, targets_c.unsqueeze(1)).squeeze(1)
    if soft is None:
        return hard_c
    rows_cK = soft.rows(targets_c)
    # A distribution sums to 1, so log-likelihood is the expected logit less the same normaliser.
    return torch.where(rows_cK.sum(1) > 0, (rows_cK * logits_cV[:, soft.ids]).sum(1), hard_c)


def _softmax_(logits_cV: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits into probabilities in place; return them and the logarithms of their normalisers (c,)."""
    largest_c1 = logits_cV.amax(1, keepdim=True)
    exponentials_cV = logits_cV.sub_(largest_c1).exp_()
    sums_c1 = exponentials_cV.sum(1, keepdim=True)
    return exponentials_cV.div_(sums_c1), (largest_c1 + sums_c1.log()).squeeze(1)


def _subtract_targets_(probabilities_cV: Tensor, targets_c: Tensor, soft: SoftTargets | None) -> None:
    """Turn probabilities into the gradient of the likelihoods by the logits, in place."""
    hard_c = torch.ones(len(targets_c), dtype=torch.float32, device=targets_c.device)
    if soft is not None:
        rows_cK = soft.rows(targets_c)
        probabilities_cV.index_add_(1, soft.ids, rows_cK, alpha=-1)
        hard_c -= (rows_cK.sum(1) > 0).float()
    probabilities_cV.scatter_add_(1, targets_c.unsqueeze(1), -hard_c.unsqueeze(1))


class _Gradients:
    """Sums the gradients of a head and its input over chunks; only the ones that are needed."""

    def __init__(self, hidden_MH: Tensor, weight_VH: Tensor, needed: tuple[bool, ...]) -> None:
        self._weight_VH = weight_VH
        self.hidden_MH = torch.empty_like(hidden_MH) if needed[0] else None
        # Chunks are summed in fp32, so that many of them lose no more than one product in the weight's own type.
        self.weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if needed[1] else None

    def add(self, rows: slice, hidden_cH: Tensor, by_logits_cV: Tensor) -> None:
        """Add a chunk, given the fp32 gradient by its logits."""
        by_logits_cV = by_logits_cV.to(self._weight_VH.dtype)
        if self.hidden_MH is not None:
            torch.mm(by_logits_cV, self._weight_VH, out=self.hidden_MH[rows])
        if self.weight_VH is not None and by_logits_cV.dtype == torch.float32:
            self.weight_VH.addmm_(by_logits_cV.T, hidden_cH)
        elif self.weight_VH is not None:
            self.weight_VH += by_logits_cV.T @ hidden_cH

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        """Return both gradients in the types of what they belong to."""
        weight = self.weight_VH
        return self.hidden_MH, None if weight is None else weight.to(self._weight_VH.dtype)


class _ScalarNll(torch.autograd.Function):
    """The scaled sum of all likelihoods, with the gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        targets_M: Tensor,
        soft: SoftTargets | None,
        chunk: int,
        scale: float,
        differentiable: bool,
    ) -> Tensor:
        needed = tuple(differentiable and need for need in ctx.needs_input_grad[:2])
        gradients = _Gradients(hidden_MH, weight_VH, needed)
        total = torch.zeros((), dtype=torch.float32, device=hidden_MH.device)
        with _no_autocast(hidden_MH):
            for rows in _chunks(len(targets_M), chunk):
                logits_cV = (hidden_MH[rows] @ weight_VH.T).float()
                total -= _target_logits(logits_cV, targets_M[rows], soft).sum()
                probabilities_cV, normaliser_c = _softmax_(logits_cV)
                total += normaliser_c.sum()
                if any(needed):
                    _subtract_targets_(probabilities_cV, targets_M[rows], soft)
                    gradients.add(rows, hidden_MH[rows], probabilities_cV.mul_(scale))
        ctx.save_for_backward(*gradients.result())
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because a second gradient of the head is what this module avoids. Autograd sees it: asking for
        # the saved tensors once more fails instead of scaling twice.
        scaled = (None if gradient is None else gradient.mul_(by_loss) for gradient in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None)


class _RecomputedNll(torch.autograd.Function):
    """One likelihood for every token; the backward pass makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden_MH: Tensor, weight_VH: Tensor, targets_M: Tensor, soft: SoftTargets | None, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(hidden_MH, weight_VH, targets_M)
        ctx.soft, ctx.chunk = soft, chunk
        nll = torch.empty(len(targets_M), dtype=torch.float32, device=hidden_MH.device)
        with _no_autocast(hidden_MH):
            for rows in _chunks(len(targets_M), chunk):
                logits_cV = (hidden_MH[rows] @ weight_VH.T).float()
                nll[rows] = -_target_logits(logits_cV, targets_M[rows], soft)
                nll[rows] += _softmax_(logits_cV)[1]
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_nll_M: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MH, weight_VH, targets_M = ctx.saved_tensors
        gradients = _Gradients(hidden_MH, weight_VH, ctx.needs_input_grad[:2])
        with _no_autocast(hidden_MH):
            for rows in _chunks(len(targets_M), ctx.chunk):
                by_logits_cV, _ = _softmax_((hidden_MH[rows] @ weight_VH.T).float())
                _subtract_targets_(by_logits_cV, targets_M[rows], ctx.soft)
                gradients.add(rows, hidden_MH[rows], by_logits_cV.mul_(by_nll_M[rows].unsqueeze(1)))
        return (*gradients.result(), None, None, None)


def _chunk_size(chunk_tokens: int | None, num_ids: int, reduction: str) -> int:
    if reduction not in _REDUCTIONS:
        raise ConfigError(f"reduction is {reduction!r}", f"use one of {', '.join(_REDUCTIONS)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens is {chunk_tokens}", "use 1 or more, or None for the default")
    return chunk_tokens or max(1, _CHUNK_ELEMENTS // num_ids)


def _chunks(num_tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, num_tokens)) for start in range(0, num_tokens, chunk))


def _in_compute_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cast to what a linear layer would compute in at this place, under autocast or not."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return hidden.to(dtype), weight.to(dtype)


def _no_autocast(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)


def calls_must_agree(head: nn.Module) -> bool:
    """Whether all processes of a group have to call a head equally often, because its weights are fetched from all."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    sharded = any(hasattr(parameter, "ds_id") for parameter in head.parameters())
    return several and sharded and torch.distributed.get_world_size() > 1


def _agreed_calls(calls: int, device: torch.device) -> int:
    """Return the largest number of calls that any process needs."""
    most = torch.tensor([calls], device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def _is_plain_linear(head: nn.Module) -> bool:
    """Whether calling the head does nothing but multiply by its weight."""
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and getattr(head, "bias", None) is None
        # Hooks fetch sharded or offloaded weights, which are not there without a call.
        and not (head._forward_pre_hooks or head._forward_hooks or hasattr(head, "_hf_hook"))
    )
