"""Likelihood of every answer under a model: the raw material of DeltaLoss (paper section 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nvila.data.collation import Batch, collate
from nvila.data.conversation import ConversationEncoder, Encoded
from nvila.data.records import Sample, group_by_images
from nvila.data.tensors import PixelCache
from nvila.losses import supervised_nll
from nvila.modeling import NVILAForConditionalGeneration
from nvila.progress import SILENT, Reporter

Hidden = Callable[[Batch], Tensor]
"""Runs a model on a batch and returns the hidden states (B, L, H) that its head takes."""


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

    def hidden(batch: Batch) -> Tensor:
        media = {"pixel_values": pixels(batch.images)} if batch.images else {}
        return nvila_hidden(model, batch, media)

    groups = group_by_images(samples)
    # Rows of like size share a batch, so that little of it is padding.
    groups.sort(key=len)
    scores: list[AnswerScore | None] = [None] * len(samples)
    done = 0
    for start in range(0, len(groups), images_per_batch):
        part = groups[start : start + images_per_batch]
        encoded = [[encoder(samples[index]) for index in group] for group in part]
        found = score_rows(encoded, hidden, model.lm_head, model.config.text_config.pad_token_id)
        for index, score in zip(_flat(part), found, strict=True):
            scores[index] = score
        done += sum(map(len, part))
        reporter.progress(phase, done, len(samples))
    return [score for score in scores if score is not None]


def nvila_hidden(model: NVILAForConditionalGeneration, batch: Batch, media: Mapping[str, Tensor]) -> Tensor:
    """Run the model below its head; `media` are the pixel arguments of `NVILAModel.forward`."""
    device = model.device
    outputs = model.model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        position_ids=batch.position_ids.to(device),
        use_cache=False,
        **media,
    )
    hidden: Tensor = outputs.last_hidden_state
    return hidden


@torch.inference_mode()
def score_rows(
    rows: Sequence[Sequence[Encoded]], hidden: Hidden, head: nn.Module, pad_token_id: int | None
) -> list[AnswerScore]:
    """Score one batch: one forward pass for all rows.

    Args:
        rows: Samples; those of one row share their images.
        hidden: Runs the model on the collated batch.
        head: Maps hidden states to logits.
        pad_token_id: Written at padded positions, which nothing looks at.

    Returns:
        One score a sample, row after row.
    """
    batch = collate(rows, pad_token_id or 0)
    hidden_BLH = hidden(batch)
    nll_M, mask_BL = supervised_nll(head, hidden_BLH, batch.labels.to(hidden_BLH.device))
    sizes = torch.tensor([len(row) for row in rows])
    first_of_row_B1 = (sizes.cumsum(0) - sizes).unsqueeze(1)
    # Segments count samples of a row from 1; with the row's offset they number the samples of the batch from 0.
    sample_of_token = (first_of_row_B1 + batch.segments - 1)[mask_BL.cpu()]
    total = int(sizes.sum())
    sums = torch.zeros(total).index_add_(0, sample_of_token, nll_M.cpu())
    counts = torch.bincount(sample_of_token, minlength=total)
    return [
        AnswerScore(nll=value, num_tokens=count) for value, count in zip(sums.tolist(), counts.tolist(), strict=True)
    ]


def _flat(groups: Sequence[Sequence[int]]) -> list[int]:
    return [index for group in groups for index in group]
