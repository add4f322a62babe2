"""Put a load on a model and note when each token came: through the engine, or through `generate` one at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from nvila.inference.engine import Engine, SamplingParams
from nvila.inference.prompt import model_inputs
from nvila.inference.request import Usage

if TYPE_CHECKING:
    from PIL import Image

    from nvila.data.records import Message
    from nvila.data.video import Video


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A conversation to answer, with its decoded media by the keys of its parts."""

    messages: Sequence[Message]
    media: Mapping[str, Image.Image | Video]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One answer and when its pieces came.

    Args:
        token_ids: The answer, without a token that ended it.
        started: When it was asked for, in seconds of `time.perf_counter`, as all times.
        times: When each piece came: a token, or several whose text was certain at once.
        usage: What the engine counted; None from `generate`.
    """

    token_ids: Sequence[int]
    started: float
    times: Sequence[float]
    usage: Usage | None = None

    @property
    def first_token_s(self) -> float:
        """Seconds from the question to the first piece; media are prepared within."""
        return self.times[0] - self.started

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between neighbouring pieces."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRun:
    """Answers to all prompts, in their order, and how long they took together."""

    traces: Sequence[Trace]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all answers a second."""
        return sum(len(trace.token_ids) for trace in self.traces) / self.seconds


def run_engine(engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, *, streams: int) -> LoadRun:
    """Answer prompts with so many under way at once: whoever is done takes the next one.

    Args:
        engine: The engine; nobody else uses it meanwhile.
        prompts: What to ask.
        params: How to choose tokens, of all.
        streams: Callers, each a thread.

    Raises:
        NvilaError: A prompt that cannot be answered, the first one; no more are asked then.
    """
    traces: dict[int, Trace] = {}
    errors: list[Exception] = []
    numbers = iter(range(len(prompts)))
    lock = threading.Lock()

    def call() -> None:
        while not errors:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                traces[number] = _ask(engine, prompts[number], params)
            except Exception as e:  # raised again by the caller's thread
                errors.append(e)

    began = time.perf_counter()
    threads = [threading.Thread(target=call, name=f"stream-{number}") for number in range(min(streams, len(prompts)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    seconds = time.perf_counter() - began
    return LoadRun(traces=[traces[number] for number in range(len(prompts))], seconds=seconds)


def run_generate(engine: Engine, prompts: Sequence[Prompt], params: SamplingParams) -> LoadRun:
    """Answer the same prompts with the engine's model and its `generate`, one after the other, greedily."""
    began = time.perf_counter()
    traces = [_generate(engine, prompt, params.max_tokens) for prompt in prompts]
    return LoadRun(traces=traces, seconds=time.perf_counter() - began)


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile of some values, interpolated between neighbours.

    Example:
        >>> percentile([1.0, 2.0, 3.0], 50)
        2.0
    """
    if len(values) < 2:
        return values[0]
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def _ask(engine: Engine, prompt: Prompt, params: SamplingParams) -> Trace:
    started = time.perf_counter()
    running = engine.stream(prompt.messages, prompt.media, params)
    times = [time.perf_counter() for _ in running]
    return Trace(token_ids=running.token_ids, started=started, times=times, usage=running.usage)


@torch.inference_mode()
def _generate(engine: Engine, prompt: Prompt, max_tokens: int) -> Trace:
    clock = _Clock()
    started = time.perf_counter()
    inputs = model_inputs(engine.processor, prompt.messages, prompt.media)
    model = engine.model
    dtype, device = model.dtype, model.device
    on_device = {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()}
    out = cast("Any", model).generate(
        **on_device,
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=sorted(engine.stop_ids),
        streamer=clock,
    )
    tokens = out[0, inputs["input_ids"].shape[1] :].tolist()
    said = [token for token in tokens if token not in engine.stop_ids]
    return Trace(token_ids=said, started=started, times=clock.times)


class _Clock(BaseStreamer):
    """Notes when `generate` has a token; the first call brings the prompt."""

    def __init__(self) -> None:
        self._prompt_seen = False
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""


__all__ = ["LoadRun", "Prompt", "Trace", "percentile", "run_engine", "run_generate"]
