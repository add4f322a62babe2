"""Likelihood of every answer under a model: the raw material of DeltaLoss (paper section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nvila.data.collation import collate
from nvila.data.conversation import ConversationEncoder, Encoded
from nvila.data.records import Sample, group_by_images
from nvila.data.tensors import PixelCache
from nvila.modeling import NVILAForConditionalGeneration
from nvila.progress import SILENT, Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerScore:
    """Negative log-likelihood of an answer, the turn end included, summed over its tokens."""

    nll: float
    num_tokens: int


@torch.inference_mode()
def score_answers(
    model: NVILAForConditionalGeneration,
    encoder: ConversationEncoder,
    samples: Sequence[Sample],
    pixels: PixelCache,
    *,
    images_per_batch: int = 64,
    reporter: Reporter = SILENT,
    phase: str = "score",
) -> list[AnswerScore]:
    """Score the answers of samples; those that share images are scored in one row.

    Args:
        model: Model in evaluation mode.
        encoder: Tokenises for this model.
        samples: What to score; every sample has an answer.
        pixels: Tiles of all images.
        images_per_batch: Rows of a forward pass.
        reporter: Receives progress in samples.
        phase: Name of the progress.

    Returns:
        One score a sample, in the order of `samples`.
    """
    groups = group_by_images(samples)
    # Rows of like size share a batch, so that little of it is padding.
    groups.sort(key=len)
    scores: list[AnswerScore | None] = [None] * len(samples)
    done = 0
    for start in range(0, len(groups), images_per_batch):
        part = groups[start : start + images_per_batch]
        encoded = [[encoder(samples[index]) for index in group] for group in part]
        for index, score in zip(_flat(part), _score_batch(model, encoded, pixels), strict=True):
            scores[index] = score
        done += sum(map(len, part))
        reporter.progress(phase, done, len(samples))
    return [score for score in scores if score is not None]


def _score_batch(
    model: NVILAForConditionalGeneration, groups: list[list[Encoded]], pixels: PixelCache
) -> list[AnswerScore]:
    batch = collate(groups, model.config.text_config.pad_token_id)
    outputs = model.model(
        input_ids=batch.input_ids,
        pixel_values=pixels(batch.images) if batch.images else None,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
    )
    nll, mask_BL = model.supervised_nll(outputs.last_hidden_state, batch.labels)
    sizes = torch.tensor([len(group) for group in groups])
    first_of_row_B1 = (sizes.cumsum(0) - sizes).unsqueeze(1)
    # Segments count samples of a row from 1; with the row's offset they number the samples of the batch from 0.
    sample_of_token = (first_of_row_B1 + batch.segments - 1)[mask_BL]
    total = int(sizes.sum())
    sums: Tensor = torch.zeros(total).index_add_(0, sample_of_token, nll)
    counts = torch.bincount(sample_of_token, minlength=total)
    return [
        AnswerScore(nll=value, num_tokens=count) for value, count in zip(sums.tolist(), counts.tolist(), strict=True)
    ]


def _flat(groups: Sequence[Sequence[int]]) -> list[int]:
    return [index for group in groups for index in group]
