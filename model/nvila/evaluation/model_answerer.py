"""A loaded model that answers questions, several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from nvila.data.video import Video
from nvila.evaluation.asking import Piece, Question
from nvila.evaluation.runner import PromptTooLongError
from nvila.evaluation.task import GenerationSettings
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor


class ModelAnswerer:
    """Answers greedily with a model.

    Args:
        model: Model in evaluation mode.
        processor: Its processor.
    """

    def __init__(self, model: NVILAForConditionalGeneration, processor: NVILAProcessor) -> None:
        self.model, self.processor = model, processor

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], settings: GenerationSettings) -> list[str]:
        """Answer questions together, padded on the left.

        Raises:
            DataError: A medium cannot be read.
            PromptTooLongError: A prompt leaves no room for an answer.
        """
        inputs = self.inputs(questions, settings)
        length = inputs["input_ids"].shape[1]
        room = int(self.processor.tokenizer.model_max_length) - length
        out = cast("Any", self.model).generate(
            **inputs, max_new_tokens=min(room, settings.max_new_tokens), do_sample=False
        )
        texts = self.processor.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def inputs(self, questions: Sequence[Question], settings: GenerationSettings) -> dict[str, Tensor]:
        """Return what the model is called with for questions, padded on the left.

        Raises:
            DataError: A medium cannot be read.
            PromptTooLongError: A prompt leaves no room for an answer.
        """
        conversations = [
            [{"role": "user", "content": [self._part(piece, settings) for piece in question.pieces]}]
            for question in questions
        ]
        inputs = self.processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        length = inputs["input_ids"].shape[1]
        room = int(self.processor.tokenizer.model_max_length) - length
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {length} tokens, and the model's context {length + room}",
                "sample fewer frames with --frames, or take a model with a longer context",
            )
        return dict(inputs.to(self.model.device, dtype=self.model.dtype))

    def _part(self, piece: Piece, settings: GenerationSettings) -> dict[str, Any]:
        value = piece.value
        if piece.kind == "video" and not isinstance(value, Video):
            value = self.processor.video_processor.load(value, num_frames=settings.num_frames)
        return {"type": piece.kind, piece.kind: value}
