"""Batched scoring and answering give what single forward passes and `generate` give."""

from __future__ import annotations

import pytest
import torch

from nvila.curation.scoring import score_answers
from nvila.data.conversation import ConversationEncoder
from nvila.data.records import Sample, vqa_sample
from nvila.data.tensors import PixelCache
from nvila.evaluation.answering import answer_questions
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

ROWS = [
    ("a", "what color is the shape?", "red"),
    ("b", "is there a circle?", "yes"),
    ("a", "is there a circle?", "no"),
    ("b", "what color is the shape?", "blue"),
    ("a", "what color is the circle?", "red"),
]


@pytest.fixture
def samples() -> list[Sample]:
    return [
        vqa_sample(id=str(number), source="s", image=image, question=question, answer=answer)
        for number, (image, question, answer) in enumerate(ROWS)
    ]


@pytest.mark.parametrize("images_per_batch", [1, 2], ids=["one-row", "two-rows"])
def test_scores_equal_single_forward_passes(
    model: NVILAForConditionalGeneration,
    encoder: ConversationEncoder,
    tiles: PixelCache,
    samples: list[Sample],
    images_per_batch: int,
) -> None:
    scores = score_answers(model, encoder, samples, tiles, images_per_batch=images_per_batch)
    for sample, score in zip(samples, scores, strict=True):
        encoded = encoder(sample)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([encoded.ids]), pixel_values=tiles(sample.images)).logits[0]
        labels = torch.tensor(encoded.labels)
        at = (labels != -100).nonzero().flatten()
        expected = -logits[at - 1].log_softmax(-1)[torch.arange(len(at)), labels[at]].sum()
        assert score.nll == pytest.approx(float(expected), rel=1e-4)
        assert score.num_tokens == len(at)


@pytest.mark.parametrize("batch_size", [1, 3], ids=["one-by-one", "batched"])
def test_answers_equal_generate(
    model: NVILAForConditionalGeneration,
    processor: NVILAProcessor,
    tiles: PixelCache,
    samples: list[Sample],
    batch_size: int,
) -> None:
    answers = answer_questions(model, processor, samples, tiles, batch_size=batch_size, max_new_tokens=3)
    for sample, answer in zip(samples, answers, strict=True):
        ids = torch.tensor([processor.prompt_ids(sample.messages[:-1])])
        out = model.generate(  # type: ignore[misc]  # typed for classes of transformers only
            input_ids=ids,
            pixel_values=tiles(sample.images),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3,
            do_sample=False,
        )
        expected = processor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer == str(expected).strip()
