"""What all scorers do with a window: tokenise what can be scored, then score it batch by batch."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nvila.curation.batching import batches
from nvila.curation.problems import Problem
from nvila.curation.scoring import AnswerScore
from nvila.curation.windows import Window
from nvila.data.conversation import ConversationEncoder, Encoded
from nvila.data.records import Sample
from nvila.errors import ConfigError, DataError, ResourceError

Outcome = AnswerScore | Problem
ScoreBatch = Callable[[Sequence[Sequence[Encoded]]], list[AnswerScore]]


def context_of(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest row: what the positions of the decoder allow, and what its tokenizer says it was trained on."""
    limits = (getattr(config, "max_position_embeddings", None), tokenizer.model_max_length)
    return min((int(limit) for limit in limits if limit), default=sys.maxsize)


def encode_all(window: Window, encoder: ConversationEncoder, context: int) -> list[Encoded | Problem]:
    """Tokenise the samples of a window; what is longer than `context` tokens cannot be scored."""
    outcomes: list[Encoded | Problem] = []
    for sample in window.samples:
        outcomes.append(sample if isinstance(sample, Problem) else _encode(sample, encoder, context))
    return outcomes


def _encode(sample: Sample, encoder: ConversationEncoder, context: int) -> Encoded | Problem:
    try:
        encoded = encoder(sample)
    except ConfigError as e:  # the frames of a video do not divide into the model's pools
        return Problem(status="bad_media", reason=str(e))
    except DataError as e:
        return Problem(status="unreadable", reason=str(e))
    if len(encoded.ids) > context:
        return Problem(status="too_long", reason=f"{len(encoded.ids)} tokens, the model takes {context}")
    if not any(label >= 0 for label in encoded.labels[1:]):
        return Problem(status="no_answer", reason="the answer has no tokens")
    return encoded


def score_all(outcomes: Sequence[Encoded | Problem], max_tokens: int, score: ScoreBatch) -> list[Outcome]:
    """Score what could be encoded, batch by batch.

    Args:
        outcomes: One for every record.
        max_tokens: Budget of a batch.
        score: Scores the rows of one batch, sample after sample.

    Raises:
        ResourceError: A batch does not fit into the device's memory.
    """
    encoded = {index: one for index, one in enumerate(outcomes) if isinstance(one, Encoded)}
    results: list[Outcome] = [
        one if isinstance(one, Problem) else _lost("the model gave no likelihood") for one in outcomes
    ]
    for batch in batches(encoded, max_tokens):
        try:
            found = score([[encoded[index] for index in row] for row in batch])
        except torch.OutOfMemoryError as e:
            raise ResourceError(
                f"a batch of {max_tokens} tokens does not fit into the memory of the device", "lower --batch-tokens"
            ) from e
        scores = iter(found)
        for row in batch:
            own = [next(scores) for _ in row]
            if len(row) > 1 and not all(math.isfinite(one.nll) for one in own):
                # One broken sample spoils the row that it shares; alone, the others are what they are.
                own = [score([[encoded[index]]])[0] for index in row]
            for index, one in zip(row, own, strict=True):
                results[index] = one if math.isfinite(one.nll) else _lost(f"the log-likelihood is {-one.nll}")
    return results


def _lost(reason: str) -> Problem:
    return Problem(status="not_finite", reason=reason)
