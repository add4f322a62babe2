from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvila.data.records import Message, Part, Sample, group_by_images, read_jsonl, vqa_sample, write_jsonl
from nvila.errors import DataError

PARTS = st.builds(Part, type=st.sampled_from(["text", "image", "video"]), value=st.text())
MESSAGES = st.builds(
    Message, role=st.sampled_from(["system", "user", "assistant"]), content=st.lists(PARTS, max_size=3).map(tuple)
)
SAMPLES = st.builds(
    Sample, id=st.text(), source=st.text(), messages=st.lists(MESSAGES, min_size=1, max_size=3).map(tuple)
)
GOOD: dict[str, Any] = {"id": "1", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}


@given(samples=st.lists(SAMPLES, max_size=4))
@settings(max_examples=60, deadline=None)
def test_samples_come_back_from_a_file_as_they_were(
    samples: list[Sample], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("records") / "s.jsonl"
    assert write_jsonl(path, samples) == len(samples)
    assert len(path.read_bytes().splitlines()) == len(samples)
    assert list(read_jsonl(path)) == samples


def test_json_form_is_the_chat_message_shape() -> None:
    sample = vqa_sample(id="7", source="vqa", image="train/3", question="what?", answer="a cat")
    assert sample.to_dict() == {
        "id": "7",
        "source": "vqa",
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": "train/3"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        ],
    }


def test_question_answer_and_images_are_read_off_the_messages() -> None:
    def text(value: str) -> Part:
        return Part(type="text", value=value)

    sample = Sample(
        id="1",
        source="s",
        messages=(
            Message(role="system", content=(text("be brief"),)),
            Message(role="user", content=(Part(type="image", value="x"), text("one "), text("two"))),
            Message(role="assistant", content=(text("first"),)),
            Message(role="user", content=(text("three"), Part(type="image", value="y"))),
            Message(role="assistant", content=(text("last"),)),
        ),
    )
    assert sample.images == ("x", "y")
    assert sample.question == "one two\nthree"
    assert sample.answer == "last"


def test_open_question_has_no_answer_and_text_only_sample_no_image() -> None:
    sample = vqa_sample(id="1", source="s", image=None, question="why?", answer=None)
    assert (sample.answer, sample.images, sample.question) == ("", (), "why?")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{oops", "broken JSON"),
        ("[1]", "must be a JSON object, got list"),
        (json.dumps({**GOOD, "messages": []}), "sample '1' has no messages"),
        (json.dumps({"messages": GOOD["messages"]}), "'id'"),
        (json.dumps({"id": "1"}), "'messages'"),
        (json.dumps({"id": "1", "messages": [{"role": "robot", "content": []}]}), "robot"),
        (json.dumps({"id": "1", "messages": [{"role": "user", "content": [{"type": "audio"}]}]}), "audio"),
        (json.dumps({"id": "1", "messages": [{"role": "user", "content": [{"type": "image"}]}]}), "'path'"),
        (json.dumps({"id": "1", "messages": [{"role": "user", "content": "plain"}]}), "not a sample record"),
        (json.dumps({"id": "1", "messages": "plain"}), "not a sample record"),
        (json.dumps({"id": "1", "messages": 3}), "not a sample record"),
    ],
)
def test_broken_line_is_named_with_file_and_number(line: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"^data\.jsonl:2: ") as caught:
        list(read_jsonl(path))
    assert named in caught.value.message


def test_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"id": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl"):
        list(read_jsonl(path))


@pytest.mark.parametrize("name", ["absent.jsonl", ""])
def test_missing_file_and_folder_are_data_errors(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read samples from"):
        list(read_jsonl(tmp_path / name))


def test_source_has_a_default() -> None:
    assert Sample.from_dict(GOOD, where="x").source == "default"


def test_samples_group_by_their_images_in_order_of_appearance() -> None:
    images = ["b", "a", "b", None, "a", None]
    samples = [vqa_sample(id=str(i), source="s", image=key, question="q", answer="a") for i, key in enumerate(images)]
    groups = group_by_images(samples)
    assert groups == [[0, 2], [1, 4], [3], [5]]
