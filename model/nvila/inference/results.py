"""What an engine gives back: finished answers, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass

from nvila.inference.request import FinishReason, Usage
from nvila.inference.sampling import TokenLogprob


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What an engine holds at a moment, and what it has done so far."""

    running: int
    waiting: int
    blocks: int
    blocks_used: int
    media_bytes: int
    media_hits: int
    media_misses: int
    preemptions: int
    steps: int
    encode_s: float
