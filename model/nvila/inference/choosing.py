"""Choosing the next token of several requests: plain greedy ones together, the others by their own sampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nvila.inference.request import Request
from nvila.inference.sampling import TokenLogprob, logprobs_of


def choose_all(
    rows: Sequence[tuple[Request, Tensor]], tokenizer: PreTrainedTokenizerBase, stop_ids: Set[int]
) -> Iterator[tuple[Request, int | Exception]]:
    """Choose a token for every request; one that fails gets its error and the others their tokens.

    Args:
        rows: Requests and the logits (V) of their next token, fp32 on the CPU.
        tokenizer: Spells tokens where log-probabilities are asked for.
        stop_ids: Tokens that end an answer.
    """
    plain = [(request, logits) for request, logits in rows if request.params.plain_greedy]
    if plain:
        tokens = torch.stack([logits for _, logits in plain]).argmax(-1).tolist()
        yield from zip((request for request, _ in plain), tokens, strict=True)
    for request, logits_V in rows:
        if request.params.plain_greedy:
            continue
        try:
            token = _choose(request, logits_V)
            if request.params.logprobs is not None and token not in stop_ids:
                request.logprobs.append(_reported(logits_V, token, request.params.logprobs, tokenizer))
        except Exception as e:
            yield request, e
        else:
            yield request, token


def _choose(request: Request, logits_V: Tensor) -> int:
    if request.constraint is None:
        return request.sampler.choose(logits_V)
    token = request.sampler.choose(logits_V, request.constraint.allowed())
    request.constraint.accept(token)
    return token


def _reported(logits_V: Tensor, token: int, num_top: int, tokenizer: PreTrainedTokenizerBase) -> TokenLogprob:
    logprob, top = logprobs_of(logits_V, token, num_top)
    spelled = tuple((str(tokenizer.decode([one])), value) for one, value in top)
    return TokenLogprob(str(tokenizer.decode([token])), logprob, spelled)
