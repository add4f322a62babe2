"""One request on its way through the engine, and what its caller sees of it.

Shape suffixes: M visual tokens of the request, H language width.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from nvila.inference.answer_text import AnswerText
from nvila.inference.grammar import JsonConstraint
from nvila.inference.media import Medium
from nvila.inference.sampling import Sampler, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from nvila.inference.engine import Engine
    from nvila.inference.variants import Variant

FinishReason = Literal["stop", "length"]
Sink: TypeAlias = Callable[["Delta"], None]


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of an answer; the last one carries the reason it ended."""

    text: str
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class Usage:
    """Tokens of a request so far; `prompt_tokens` includes the visual ones, `cached_tokens` were computed earlier."""

    prompt_tokens: int = 0
    visual_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """State of one request.

    Args:
        number: Order of arrival; names the request.
        variant: Which of the engine's models answers it.
        wake: Its reader sleeps on it, with the engine's lock.
        ids: Prompt, and behind it the answer so far.
        media: Images and videos of the prompt.
        params: How to choose tokens.
        limit: Most tokens of the answer.
        text: Makes text of tokens.
        sampler: Chooses tokens.
        constraint: What the answer must follow.
        deadline: When it fails, on the monotonic clock.
    """

    number: int
    variant: Variant
    wake: threading.Condition
    ids: list[int]
    media: Sequence[Medium]
    params: SamplingParams
    limit: int
    text: AnswerText
    sampler: Sampler
    constraint: JsonConstraint | None = None
    deadline: float | None = None
    usage: Usage = field(default_factory=Usage)
    # Positions whose keys and values are in the blocks.
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    features: Tensor | None = None
    places: Tensor | None = None
    outbox: deque[Delta | Exception] = field(default_factory=deque)
    # Gets the pieces in place of the outbox; called by whoever runs the step.
    sink: Sink | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    done: bool = False

    @property
    def pending(self) -> int:
        """Tokens that the model has not seen yet."""
        return len(self.ids) - self.computed

    @property
    def answer_ids(self) -> list[int]:
        """Tokens of the answer so far, without one that ended it."""
        return self.ids[self.usage.prompt_tokens :]

    def take(self) -> Delta | None:
        """Take the next piece from the outbox; None when there is nothing more.

        Raises:
            Exception: The request failed.
        """
        if not self.outbox:
            return None
        event = self.outbox.popleft()
        if isinstance(event, Delta):
            return event
        try:
            raise event
        finally:
            del event  # this frame and the error would keep each other

    def needs_media(self) -> bool:
        """Whether visual tokens are missing that the model has still to see."""
        if self.features is not None:
            return False
        return any(int(medium.places[-1]) >= self.computed for medium in self.media)

    def set_features(self, features: Sequence[Tensor]) -> None:
        """Keep the visual tokens of all media in the order of their positions."""
        places = torch.cat([medium.places for medium in self.media])
        order = places.argsort()
        self.places = places[order]
        tokens_MH = torch.cat(list(features))
        self.features = tokens_MH[order.to(tokens_MH.device)]

    def chain(self, block_size: int) -> list[bytes]:
        """Return the digest of every full block: of its tokens and media, the variant, and all before it."""
        for number in range(len(self.digests), len(self.ids) // block_size):
            start, end = number * block_size, (number + 1) * block_size
            digest = hashlib.sha256(self.digests[-1] if self.digests else self.variant.salt)
            digest.update(array("q", self.ids[start:end]).tobytes())
            for medium in self.media:
                first, after = torch.searchsorted(medium.places, torch.tensor([start, end])).tolist()
                if first < after:
                    digest.update(medium.digest + array("q", [first, after, *medium.places[first:after]]).tobytes())
            self.digests.append(digest.digest())
        return self.digests


class Generation:
    """A running request: iterate for deltas, `close` to cancel. `usage` stays readable afterwards."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine
        self._request = request

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return self._request.usage

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the answer so far, without one that ended it."""
        return self._request.answer_ids

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        piece = self._engine._next(self._request)
        if piece is None:
            raise StopIteration
        return piece

    def deliver(self, to: Sink) -> None:
        """Hand every piece to `to` as it is made; return at the answer's end, or when it was closed.

        Threads that iterate all wake up for every step, one token each, and stand in the way of the next one. Here
        whoever runs the step calls `to`, and the threads of the others sleep until their answers have ended.

        Args:
            to: Called with the engine's lock held, so it must not wait, nor call the engine.

        Raises:
            NvilaError: As iterating does; also whatever `to` raises, which ends this answer and no other.
        """
        self._engine._deliver(self._request, to)

    def close(self) -> None:
        """Cancel the request and free its memory; harmless when it has ended."""
        self._engine.abort(self)

    def __del__(self) -> None:
        # Nobody can read the answer any more.
        self._engine.abort(self)
