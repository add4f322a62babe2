"""What a model answers to held-out samples, of any number of turns and media."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch

from nvila.data.images import load_image
from nvila.data.readers.record import CountedStream, Record
from nvila.data.records import Message, Part
from nvila.errors import DataError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.progress import SILENT, Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The answer to one sample.

    Args:
        id: Id of the sample.
        source: Its source.
        question: Text of its user turns.
        wanted: The last answer of the conversation.
        said: What the model said in its place.
    """

    id: str
    source: str
    question: str
    wanted: str
    said: str


@torch.inference_mode()
def answer_stream(
    model: NVILAForConditionalGeneration,
    processor: NVILAProcessor,
    stream: CountedStream,
    *,
    limit: int = 256,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    reporter: Reporter = SILENT,
    phase: str = "answer",
) -> list[Answered]:
    """Let a model answer the last turn of each sample, greedily; samples that cannot be read are left out.

    Args:
        model: Model in evaluation mode.
        processor: Its processor.
        stream: The samples.
        limit: Most samples, from the front.
        batch_size: Answered together.
        max_new_tokens: Longest answer.
        reporter: Receives progress.
        phase: Name of the progress.
    """
    answered: list[Answered] = []
    total = min(limit, stream.count())
    batch: list[tuple[Record, list[dict[str, Any]]]] = []
    for number, record in enumerate(stream.records(stop=total), start=1):
        if (asked := _asked(record, processor)) is not None:
            batch.append((record, asked))
        if len(batch) == batch_size:
            answered += _answer(model, processor, batch, max_new_tokens)
            batch = []
        reporter.progress(phase, number, total)
    # Behind the last one that comes, which may be before the last one that was counted.
    if batch:
        answered += _answer(model, processor, batch, max_new_tokens)
    return answered


def _answer(
    model: NVILAForConditionalGeneration,
    processor: NVILAProcessor,
    batch: list[tuple[Record, list[dict[str, Any]]]],
    max_new_tokens: int,
) -> Iterator[Answered]:
    inputs = processor.apply_chat_template(
        [asked for _, asked in batch], add_generation_prompt=True, tokenize=True, return_dict=True
    ).to(model.device, dtype=model.dtype)
    length = inputs["input_ids"].shape[1]
    out = cast("Any", model).generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts = processor.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
    for (record, _), text in zip(batch, texts, strict=True):
        sample = record.sample
        assert sample is not None
        yield Answered(
            id=sample.id, source=sample.source, question=sample.question, wanted=sample.answer, said=text.strip()
        )


def _asked(record: Record, processor: NVILAProcessor) -> list[dict[str, Any]] | None:
    """Return the conversation up to the last answer, with its media; None where it cannot be read."""
    if record.sample is None or not record.sample.answer:
        return None
    try:
        return [
            {"role": message.role, "content": [_part(part, record, processor) for part in message.content]}
            for message in _before_answer(record.sample.messages)
        ]
    except DataError:
        return None


def _before_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    return messages[:-1]


def _part(part: Part, record: Record, processor: NVILAProcessor) -> dict[str, Any]:
    if part.type == "text":
        return {"type": "text", "text": part.value}
    data = record.media[part.value].read()
    if part.type == "image":
        return {"type": "image", "image": load_image(data)}
    return {"type": "video", "video": processor.video_processor.load(data)}
