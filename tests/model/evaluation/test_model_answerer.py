"""A model that answers several questions at once says what it says to each alone, and what `chat` says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from nvila.chat import ChatModel, Image
from nvila.data.video import load_video
from nvila.errors import DataError
from nvila.evaluation.asking import Piece, Question
from nvila.evaluation.fixtures import clip, picture
from nvila.evaluation.model_answerer import ModelAnswerer
from nvila.evaluation.task import GenerationSettings

if TYPE_CHECKING:
    from nvila.modeling import NVILAForConditionalGeneration
    from nvila.processing import NVILAProcessor

SETTINGS = GenerationSettings(max_new_tokens=4, num_frames=2)


def question(*pieces: tuple[str, Any]) -> Question:
    return Question(
        index=0, id="0", pieces=tuple(Piece(*piece) for piece in pieces), reference={}, group=None, digest=""
    )


@pytest.fixture
def answerer(model: NVILAForConditionalGeneration, processor: NVILAProcessor) -> ModelAnswerer:
    return ModelAnswerer(model, processor)


def test_a_batch_says_what_single_questions_say(answerer: ModelAnswerer) -> None:
    questions = [
        question(("image", picture("red")), ("text", "what color is the shape?")),
        question(("text", "is there a circle?")),
        question(("text", "first"), ("image", picture("one")), ("text", "second"), ("image", picture("two"))),
        question(("video", clip(["red", "blue"])), ("text", "what color is the circle?")),
    ]
    together = answerer.answer(questions, SETTINGS)
    assert together == [answerer.answer([one], SETTINGS)[0] for one in questions]
    chat = ChatModel(answerer.model, answerer.processor)
    content = [Image(picture("red")), "what color is the shape?"]
    assert together[0] == chat.chat(content, max_new_tokens=4)
    assert len(set(together)) > 1


def test_frames_that_are_sampled_already_are_taken(answerer: ModelAnswerer) -> None:
    data = clip(["red", "blue"])
    sampled = load_video(data, num_frames=2)
    text = ("text", "what color is the circle?")
    ready, raw = (question(("video", value), text) for value in (sampled, data))
    assert answerer.answer([ready], SETTINGS) == answerer.answer([raw], SETTINGS)


def test_what_cannot_be_asked_is_a_data_error(answerer: ModelAnswerer) -> None:
    with pytest.raises(DataError, match=r"the prompt has 208 tokens, and the model.s context 128"):
        answerer.answer([question(("text", "red " * 200))], SETTINGS)
    with pytest.raises(DataError):
        answerer.answer([question(("image", b"no image"), ("text", "what?"))], SETTINGS)
