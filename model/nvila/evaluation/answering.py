"""Answering questions in batches with greedy decoding, as the evaluation does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvila.data.records import Sample
from nvila.data.tensors import PixelCache
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.progress import SILENT, Reporter


@torch.inference_mode()
def answer_questions(
    model: NVILAForConditionalGeneration,
    processor: NVILAProcessor,
    samples: Sequence[Sample],
    pixels: PixelCache,
    *,
    batch_size: int = 256,
    max_new_tokens: int = 8,
    reporter: Reporter = SILENT,
    phase: str = "answer",
) -> list[str]:
    """Let a model answer the question of every sample.

    Every image is encoded once. Prompts of equal length are decoded together, so no padding is needed and an answer
    does not depend on what it was batched with.

    Args:
        model: Model in evaluation mode.
        processor: Its processor.
        samples: Questions about one image each.
        pixels: Tiles of all images.
        batch_size: Prompts decoded together.
        max_new_tokens: Longest answer.
        reporter: Receives progress in samples.
        phase: Name of the progress.

    Returns:
        The answers in the order of `samples`.
    """
    features = _encode_images(model, list(dict.fromkeys(sample.images for sample in samples)), pixels)
    prompts = _prompts(processor, samples)
    by_length = sorted(range(len(samples)), key=lambda index: len(prompts[index]))
    answers = [""] * len(samples)
    done = 0
    for batch in _equal_length_batches(by_length, prompts, batch_size):
        ids_BL = torch.tensor([prompts[index] for index in batch])
        out = model.generate(  # type: ignore[misc]  # typed for classes of transformers only
            input_ids=ids_BL,
            image_features=torch.cat([features[samples[index].images] for index in batch]),
            attention_mask=torch.ones_like(ids_BL),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        texts = processor.tokenizer.batch_decode(out[:, ids_BL.shape[1] :], skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text.strip()
        done += len(batch)
        reporter.progress(phase, done, len(samples))
    return answers


def _prompts(processor: NVILAProcessor, samples: Sequence[Sample]) -> list[list[int]]:
    """Tokenise every distinct question once: benchmarks ask the same of many images."""
    known: dict[tuple[Any, ...], list[int]] = {}
    prompts = []
    for sample in samples:
        messages = sample.messages[:-1]
        key = tuple(
            (message.role, *((part.type, part.value if part.type == "text" else "") for part in message.content))
            for message in messages
        )
        if key not in known:
            known[key] = processor.prompt_ids(messages)
        prompts.append(known[key])
    return prompts


def _encode_images(
    model: NVILAForConditionalGeneration, images: list[tuple[str, ...]], pixels: PixelCache, chunk: int = 64
) -> dict[tuple[str, ...], Tensor]:
    features: dict[tuple[str, ...], Tensor] = {}
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk]
        encoded = model.get_image_features(pixels(tuple(key for keys in part for key in keys)))
        features.update(zip(part, encoded.split([len(keys) for keys in part]), strict=True))
    return features


def _equal_length_batches(order: list[int], prompts: list[list[int]], size: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in order:
        if not batches or len(batches[-1]) == size or len(prompts[batches[-1][0]]) != len(prompts[index]):
            batches.append([])
        batches[-1].append(index)
    return batches
