"""How the next token is chosen: parameters of a request, and the choice itself.

The order is that of `transformers`: constraint, penalties, temperature, top-k, top-p.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nvila.errors import ConfigError

_MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen.

    Args:
        max_tokens: Most tokens of an answer.
        temperature: 0 takes the likeliest token; larger values flatten the distribution.
        top_p: Sample from the smallest set of tokens with at least this probability together.
        top_k: Sample from this many likeliest tokens; 0 means all.
        presence_penalty: Taken from the logit of every token that the answer holds already.
        frequency_penalty: The same, once for every time that the answer holds it.
        repetition_penalty: Logits of tokens in prompt or answer are divided by it where positive, else multiplied
            (Keskar et al. 2019, as in `transformers`); 1 changes nothing.
        seed: Fixes the draws of one request.
        stop: Texts that end the answer; they are not part of it.
        logprobs: Report for every token its log-probability and those of this many likeliest tokens; None for
            nothing. They are the model's own, before penalties and temperature.
        json_schema: The answer is JSON that follows this schema, a JSON text; `{}` is any JSON.

    Raises:
        ConfigError: A value is out of range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        most = _MAX_TOP_LOGPROBS
        penalties = {name: getattr(self, name) for name in ("presence_penalty", "frequency_penalty")}
        checks = (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more"),
            ("temperature", self.temperature, self.temperature >= 0, "0 for greedy or a positive number"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 for all tokens, or 1 or more"),
            *((name, value, -2 <= value <= 2, "a number from -2 to 2") for name, value in penalties.items()),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0,
                "a positive number, 1 for none",
            ),
            ("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= most, f"0 to {most}"),
            ("stop", self.stop, "" not in self.stop, "texts with at least one character"),
        )
        for name, value, allowed, fix in checks:
            if not allowed:
                raise ConfigError(f"{name} is {value}", f"use {fix}")

    @property
    def plain_greedy(self) -> bool:
        """Whether the token is the likeliest one and nothing else is asked for, so that rows are decided together."""
        neutral = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) == (0, 0, 1)
        return self.temperature == 0 and neutral and self.logprobs is None and self.json_schema is None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a chosen token and of the likeliest ones, as (text, log-probability)."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


class Sampler:
    """Chooses the tokens of one request.

    Args:
        params: The request's parameters.
        prompt_ids: Its prompt; read by `repetition_penalty`.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.params = params
        self._noise = torch.Generator()
        if params.seed is None:
            self._noise.seed()
        else:
            self._noise.manual_seed(params.seed)
        self._said: Counter[int] = Counter()
        self._seen = set(prompt_ids) if params.repetition_penalty != 1 else set()

    def choose(self, logits_V: Tensor, allowed_V: Tensor | None = None) -> int:
        """Pick the next token and remember it.

        Args:
            logits_V: Logits in fp32 on the CPU.
            allowed_V: Which tokens a constraint allows; None for all.
        """
        if allowed_V is not None:
            # The mask covers the tokenizer; logits may have padding rows behind it.
            logits_V = logits_V.clone()
            logits_V[len(allowed_V) :] = -torch.inf
            logits_V[: len(allowed_V)].masked_fill_(~allowed_V, -torch.inf)
        token = choose_token(self._penalised(logits_V), self.params, self._noise)
        self.note(token)
        return token

    def note(self, token: int) -> None:
        """Remember a token that was chosen elsewhere."""
        self._said[token] += 1
        if self.params.repetition_penalty != 1:
            self._seen.add(token)

    def _penalised(self, logits_V: Tensor) -> Tensor:
        params = self.params
        if params.repetition_penalty != 1:
            # Placeholders of media and padded vocabularies: only ids that have a logit.
            seen = torch.tensor(sorted(token for token in self._seen if token < len(logits_V)), dtype=torch.long)
            old = logits_V[seen]
            logits_V = logits_V.index_copy(
                0, seen, torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
            )
        if self._said and (params.presence_penalty or params.frequency_penalty):
            said = torch.tensor(list(self._said))
            times = torch.tensor(list(self._said.values()), dtype=logits_V.dtype)
            logits_V = logits_V.index_add(0, said, -(params.presence_penalty + params.frequency_penalty * times))
        return logits_V


def choose_token(logits_V: Tensor, params: SamplingParams, noise: torch.Generator) -> int:
    """Pick the next token from its logits."""
    if params.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / params.temperature
    if 0 < params.top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(params.top_k).values[-1], -torch.inf)
    probabilities = logits_V.softmax(-1)
    if params.top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        # A token stays when those before it have not reached top_p yet, so the likeliest always stays.
        dropped = index[ordered.cumsum(-1) - ordered >= params.top_p]
        probabilities = probabilities.index_fill(0, dropped, 0.0)
    return int(torch.multinomial(probabilities, 1, generator=noise))


def logprobs_of(logits_V: Tensor, token: int, num_top: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the log-probability of `token` and the `num_top` likeliest tokens with theirs."""
    logprobs_V = logits_V.log_softmax(-1)
    top = logprobs_V.topk(min(num_top, len(logprobs_V))) if num_top else None
    pairs = [] if top is None else list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return float(logprobs_V[token]), pairs


__all__ = ["Sampler", "SamplingParams", "TokenLogprob", "choose_token", "logprobs_of"]
