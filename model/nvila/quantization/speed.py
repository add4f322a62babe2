"""Time to the first token and speed of decoding, of one request at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from transformers import DynamicCache

from nvila.curation.nvila_scorer import NvilaScorer
from nvila.data.collation import collate
from nvila.losses import IGNORE_INDEX
from nvila.modeling import NVILAForConditionalGeneration
from nvila.quantization.samples import SampleSet

_PROMPTS = 4
_REPEATS = 3
_DECODED = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Medians over prompts and repeats.

    Args:
        ttft_ms: From pixels to the logits of the first token: tower, projector and prefill.
        decode_tokens_per_s: Tokens a second behind the first.
    """

    ttft_ms: float
    decode_tokens_per_s: float


def prompts_of(scorer: NvilaScorer, samples: SampleSet, count: int = _PROMPTS) -> list[dict[str, Tensor]]:
    """Return the inputs of some prompts: everything in front of the first answer, with all media."""
    prompts: list[dict[str, Tensor]] = []
    for window, encoded in samples.windows(scorer):
        for one in encoded.values():
            batch = collate([[one]], 0)
            first = int((batch.labels[0] != IGNORE_INDEX).nonzero()[0])
            ids = batch.input_ids[:, :first].to(scorer.model.device)
            prompts.append({"input_ids": ids, **scorer.pixels(window, batch)})
            if len(prompts) == count:
                return prompts
    return prompts


@torch.inference_mode()
def measure_speed(model: NVILAForConditionalGeneration, prompts: Sequence[dict[str, Tensor]]) -> Speed:
    """Time prompts, one at a time, after one that does not count."""
    first, rates = [], []
    for repeat in range(_REPEATS + 1):
        for prompt in prompts:
            ttft, rate = time_prompt(model, prompt)
            if repeat:
                first.append(ttft)
                rates.append(rate)
    return Speed(ttft_ms=round(median(first) * 1000, 3), decode_tokens_per_s=round(median(rates), 2))


@torch.inference_mode()
def time_prompt(
    model: NVILAForConditionalGeneration, prompt: dict[str, Tensor], num_tokens: int = _DECODED
) -> tuple[float, float]:
    """Return seconds to the first token, and tokens a second behind it, decoded greedily without a stop."""
    cache = DynamicCache(config=model.config.text_config)
    started = _now(model.device)
    logits = model(**prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token = logits[:, -1].argmax(-1, keepdim=True)
    ttft = _now(model.device) - started
    started = _now(model.device)
    for _ in range(num_tokens):
        logits = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
    return ttft, num_tokens / (_now(model.device) - started)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
