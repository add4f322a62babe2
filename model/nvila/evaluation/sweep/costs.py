"""What one question costs at a point: visual tokens, time to the first token, memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from nvila.evaluation.asking import Question
from nvila.evaluation.model_answerer import ModelAnswerer
from nvila.evaluation.task import GenerationSettings
from nvila.quantization.saved import plain_tensors, tensor_bytes
from nvila.tuning.measuring import LiveTensors

_REPEATS = 3
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Costs of a question.

    Args:
        tokens: Visual tokens, mean over the questions.
        prompt_tokens: All tokens of the prompt, likewise.
        ttft_ms: Milliseconds from the question, its media at hand, to the first token: decoding, cutting, tower and
            prefill. Median over questions and repeats.
        ttft_low_ms: The smallest of them.
        ttft_high_ms: The largest.
        memory_mib: Weights, and at most so much more that a question's tensors take, the largest question's.
        weights_mib: Weights alone.
    """

    tokens: float
    prompt_tokens: float
    ttft_ms: float
    ttft_low_ms: float
    ttft_high_ms: float
    memory_mib: float
    weights_mib: float

    def to_dict(self) -> dict[str, float]:
        """Return the JSON form."""
        return asdict(self)


def measure_costs(answerer: ModelAnswerer, questions: Sequence[Question], settings: GenerationSettings) -> Cost:
    """Measure some questions, asked one by one; the first answer of all warms up and does not count.

    Raises:
        DataError: A medium cannot be read, or a prompt does not fit.
    """
    config = answerer.model.config
    visual, prompt, times = [], [], []
    peak = 0
    for question in questions:
        inputs = answerer.inputs([question], settings)
        ids = inputs["input_ids"]
        visual.append(sum(int((ids == token).sum()) for token in (config.image_token_id, config.video_token_id)))
        prompt.append(int(ids.numel()))
        peak = max(peak, _peak_bytes(answerer.model, inputs))
    for repeat in range(_REPEATS + 1):
        for question in questions:
            started = time.perf_counter()
            _first_token(answerer.model, answerer.inputs([question], settings))
            if repeat:
                times.append(1000 * (time.perf_counter() - started))
    weights = tensor_bytes(answerer.model)
    return Cost(
        tokens=fmean(visual),
        prompt_tokens=fmean(prompt),
        ttft_ms=median(times),
        ttft_low_ms=min(times),
        ttft_high_ms=max(times),
        memory_mib=(weights + peak) / _MIB,
        weights_mib=weights / _MIB,
    )


@torch.inference_mode()
def _first_token(model: Any, inputs: dict[str, Tensor]) -> int:
    cache = DynamicCache(config=model.config.text_config)
    logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return int(logits[:, -1].argmax(-1))  # waits for the device


def _peak_bytes(model: Any, inputs: dict[str, Tensor]) -> int:
    """Return the most bytes that tensors of a question took at once, inputs and cache included, weights not."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        _first_token(model, inputs)
        held = sum(tensor.nbytes for tensor in inputs.values())
        return int(torch.cuda.max_memory_allocated(model.device) - before + held)
    held_anyway = [cast("Tensor", one) for one in (*model.parameters(), *model.buffers())]
    with LiveTensors(tensor for one in held_anyway for tensor in plain_tensors(one)) as live:
        started = live.current
        for tensor in inputs.values():
            live.add(tensor)
        _first_token(model, inputs)
    return int(live.peak - started)
