from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import nvila
from nvila.chat import ChatModel, as_messages
from nvila.errors import CheckpointError, DataError


@pytest.fixture(scope="module")
def chat_model(saved_model: Path) -> ChatModel:
    return nvila.load(saved_model)


def test_answer_is_that_of_generate(chat_model: ChatModel, pictures: dict[str, Image.Image]) -> None:
    answer = chat_model.chat([pictures["a"], "what color is the shape?"], max_new_tokens=5)
    messages = [{"role": "user", "content": [{"type": "image", "image": pictures["a"]}, "what color is the shape?"]}]
    inputs = chat_model.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    model: Any = chat_model.model
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == chat_model.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    pieces = list(chat_model.chat([pictures["a"], "what color is the shape?"], stream=True, max_new_tokens=5))
    assert "".join(pieces).split() == answer.split()


def test_media_are_taken_in_every_form(chat_model: ChatModel, pictures: dict[str, Image.Image], tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    pictures["a"].save(path)
    forms = [pictures["a"], nvila.Image(path), nvila.Image(path.read_bytes()), path]
    answers = {chat_model.chat([form, "what color?"], max_new_tokens=4) for form in forms}
    assert len(answers) == 1
    seen: list[int] = []
    tower = chat_model.model.model.vision_tower.embeddings
    hook = tower.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    clip = nvila.Video([pictures["a"], pictures["b"], pictures["c"]], num_frames=3)
    chat_model.chat([nvila.Image(path), clip, "what shape?"], max_new_tokens=1)
    hook.remove()
    assert seen == [4]


def test_conversations_have_turns_and_a_system_prompt(chat_model: ChatModel) -> None:
    turns = [
        {"role": "user", "content": "is there a circle?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": ["what color?"]},
    ]
    rendered = chat_model.processor.apply_chat_template(as_messages(turns), tokenize=False)
    assert rendered.count("<|im_start|>") == 3
    inputs = chat_model._inputs("what?", "you are a helpful assistant.")
    tokens = chat_model.processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    assert tokens[:3] == ["<|im_start|>", "system", "\n"]
    assert isinstance(chat_model.chat(turns, max_new_tokens=2), str)


def test_temperature_samples(chat_model: ChatModel) -> None:
    torch.manual_seed(0)
    answers = {chat_model.chat("what color?", temperature=3.0, max_new_tokens=8) for _ in range(4)}
    assert len(answers) > 1


def test_closing_a_stream_stops_the_model(chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    hook = chat_model.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(chat_model.model.generation_config, "eos_token_id", None)
    pieces = chat_model.chat("what color is the shape?", stream=True, max_new_tokens=5000)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]  # a generator
    hook.remove()
    assert len(calls) < 5000


def test_error_of_the_model_reaches_the_reader_of_the_stream(
    chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(chat_model.model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(chat_model.chat("what?", stream=True))


@pytest.mark.parametrize(
    ("content", "message"), [("", "nothing to answer"), ([], "nothing"), ([7], "a int is no part")]
)
def test_content_that_cannot_be_answered_is_refused(content: Any, message: str, chat_model: ChatModel) -> None:
    with pytest.raises(DataError, match=message):
        chat_model.chat(content)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        nvila.load(tmp_path)
