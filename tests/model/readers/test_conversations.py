"""Every shape of a record becomes the same kind of sample, with its media in their places."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nvila.data.readers.record import Record
from nvila.data.records import Message, Part, PartType, Sample, write_jsonl

if TYPE_CHECKING:
    from tests.model.readers.conftest import Fields, ReadPath, WriteLines

    from nvila.data.conversation import ConversationEncoder


def llava(*values: Any, **fields: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]
    return {"conversations": turns, **fields}


def chat(*contents: Any, **fields: Any) -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[number % 2], "content": value} for number, value in enumerate(contents)]
    return {"messages": turns, **fields}


def spoken(record: Record) -> list[str]:
    """The turns of a record as texts, media as `[name]`."""
    assert record.sample is not None, record.problem

    def piece(kind: str, value: str) -> str:
        return value if kind == "text" else f"[{value.rpartition('/')[2]}]"

    return ["".join(piece(part.type, part.value) for part in message.content) for message in record.sample.messages]


SYSTEM = {"role": "system", "content": "Be <image>."}
IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (llava("<image>\nWhat?", "A cat.", image="a.jpg"), ["[a.jpg]What?", "A cat."]),
        (llava("What?\n<image>", "A cat.", image="a.jpg"), ["What?\n[a.jpg]", "A cat."]),
        (llava("What?", "A cat.", image="a.jpg"), ["[a.jpg]What?", "A cat."]),
        (llava("  What? ", " A cat.\n"), ["What?", "A cat."]),
        (llava("<image>", "A cat.", image="a.jpg"), ["[a.jpg]", "A cat."]),
        (llava("Is <image> or\n<image>\n red?", "b", images=["a", "b"]), ["Is [a] or\n[b] red?", "b"]),
        (llava("Which?", "b", images=["a", "b"]), ["[a][b]Which?", "b"]),
        (llava("Which?", "b", image=["a", "b"]), ["[a][b]Which?", "b"]),
        (llava("Which?", "b", images="a"), ["[a]Which?", "b"]),
        (llava("Why?", "b", images=[], image="", video=None), ["Why?", "b"]),
        (llava("Why?", "b", image=float("nan"), videos=[None, "", float("nan")]), ["Why?", "b"]),
        (llava("<video> Why?", "b", video="v.mp4"), ["[v.mp4]Why?", "b"]),
        (llava("<vila/video>Why?", "b", videos=["v.mp4"]), ["[v.mp4]Why?", "b"]),
        (llava("<video>Why <image>?", "b", video="v", image="a"), ["[v]Why [a]?", "b"]),
        (llava("Why <video>?", "b", video="v", image="a"), ["[a]Why [v]?", "b"]),
        (llava("<image>\none", "1", "<image> two", "2", images=["a", "b"]), ["[a]one", "1", "[b]two", "2"]),
        (llava("How is it written?", "As <image>."), ["How is it written?", "As <image>."]),
        (llava("How many?", 7), ["How many?", "7"]),
        (chat("What?", "A cat.", image="a"), ["[a]What?", "A cat."]),
        (chat("<image>What?", "A cat.", images=["a"]), ["[a]What?", "A cat."]),
        (chat([TEXT, IMAGE], [{"type": "text", "text": "A"}], images=["a"]), ["What?[a]", "A"]),
        (chat([{"type": "image", "path": "a"}, TEXT], "A"), ["[a]What?", "A"]),
        (chat([{"type": "image", "text": None, "image": "a"}, TEXT], "A"), ["[a]What?", "A"]),
        (chat([{"type": "image_url", "image_url": {"url": "a"}}, TEXT], "A"), ["[a]What?", "A"]),
        (chat([{"type": "video", "video": "v"}, TEXT], "A"), ["[v]What?", "A"]),
        (chat(["What", "?"], "A"), ["What?", "A"]),
        (
            {"messages": [{"role": "system", "content": "Be <image>."}, *chat("Q", "A")["messages"]]},
            ["Be <image>.", "Q", "A"],
        ),
        ({"conversations": json.dumps(llava("Q", "A")["conversations"])}, ["Q", "A"]),
        ({"conversations": {"from": ["human", "gpt"], "value": ["Q", "A"]}}, ["Q", "A"]),
        ({"conversations": chat("Q", "A")["messages"]}, ["Q", "A"]),
        ({"texts": [{"user": "Q", "assistant": "A", "source": "x"}], "images": ["a"]}, ["[a]Q", "A"]),
        ({"question": "<image>Q", "answer": "A", "image": "a"}, ["[a]Q", "A"]),
        ({"question": "Q", "answers": ["x", "y", "y"]}, ["Q", "y"]),
        ({"question": "Q", "answers": ["x", "y"]}, ["Q", "x"]),
        ({"question": "Q", "answers": [{"answer": "y", "confidence": 1}]}, ["Q", "y"]),
        ({"question": "Q", "answers": {"text": ["y"], "start": [3]}}, ["Q", "y"]),
        ({"caption": "a cat", "image": "a"}, ["[a]", "a cat"]),
        ({"text": "a cat", "image": "a"}, ["[a]", "a cat"]),
    ],
)
def test_a_shape_is_read(fields: Fields, says: list[str], write_lines: WriteLines, read_path: ReadPath) -> None:
    [record] = read_path(write_lines([fields]))
    assert record.problem is None
    assert spoken(record) == says


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ("{", "broken JSON: Expecting property name enclosed in double quotes at character 2"),
        ("", "the line is empty"),
        ("[1]", "a record must be an object, this is an array"),
        ("7", "a record must be an object, this is a number"),
        ("[" * 100_000, "broken JSON: nested too deeply"),
        ({}, "no conversation: expected conversations, messages"),
        ({"unknown": 1, "text": "alone"}, "no conversation: 'text' stands beside no image"),
        ({"conversations": []}, "no conversation: 'conversations' is empty"),
        ({"texts": []}, "no conversation: 'texts' is empty"),
        ({"texts": [1]}, "pair 1 of 'texts' is a number instead of an object"),
        ({"texts": [{"user": "Q"}]}, "'assistant' of pair 1 is no text but null"),
        ({"conversations": 5}, "'conversations' is a number instead of an array"),
        ({"conversations": "Q"}, "'conversations' is a text and no JSON"),
        ({"conversations": {"from": ["human"], "value": []}}, "'conversations' has columns of different lengths"),
        ({"conversations": ["Q"]}, "turn 1 is a text instead of an object"),
        ({"conversations": [{"value": "Q"}]}, "turn 1 has no sender"),
        ({"conversations": [{"from": "bot", "value": "Q"}]}, "turn 1 has the unknown sender 'bot'; known: human"),
        ({"conversations": [{"from": ["gpt"], "value": "Q"}]}, "turn 1 has the unknown sender ['gpt']"),
        ({"conversations": [{"from": "human"}]}, "turn 1 has no text"),
        (llava("Q", True), "turn 2 is no text but a boolean"),
        (llava("Q"), "no answer: the last turn is not the assistant's"),
        (llava("Q", "A", "And?"), "no answer: the last turn is not the assistant's"),
        (llava("Q", " \n"), "no answer: turn 2 is empty"),
        (chat("Q", [{"type": "text", "text": " "}]), "no answer: turn 2 is empty"),
        (llava("Q", "", "Q", "A"), "no answer: turn 2 is empty"),
        ({"conversations": [{"from": "gpt", "value": "A"}]}, "no question: nothing is from a user"),
        ({"conversations": [{"from": "gpt", "value": "A"}], "image": "a"}, "no question that the media belong to"),
        (llava("<image>Q", "A"), "1 <image> marker but 0 images"),
        (llava("<image><image>Q", "A", image="a"), "2 <image> markers but 1 image"),
        (llava("<image>Q", "A", images=["a", "b"]), "1 <image> marker but 2 images"),
        (llava("<video>Q", "A", image="a"), "1 <video> marker but 0 videos"),
        (chat([IMAGE, TEXT], "A"), "1 <image> marker but 0 images"),
        (chat([{"type": "audio"}], "A"), "turn 1 has a part of the unknown type 'audio'"),
        ({"question": "Q"}, "no answer: 'answer' and 'answers' are missing"),
        ({"question": "Q", "answers": []}, "no answer: 'answers' is empty"),
        ({"question": "Q", "answer": float("nan")}, "the answer is no text but nan"),
        ({"question": ["Q"], "answer": "A"}, "'question' is no text but an array"),
        (llava("Q", "A", image=5), "image 1 is a number instead of a path or bytes"),
        (llava("Q", "A", images=["a", {"path": None}]), "image 2 has neither bytes nor a path"),
        (llava("Q", "A", image="data:image/png;base64,%%"), "image 1 is no base64"),
        (llava("Q", "A", image="data:image/png,abc"), "image 1 is no base64: it does not say"),
        ('{"question": "\\ud800", "answer": "A"}', "'question' holds half a character"),
        ('{"id": "\\ud800", "question": "Q", "answer": "A"}', "'id' holds half a character"),
    ],
)
def test_what_cannot_be_used_says_why(
    fields: Fields | str, problem: str, write_lines: WriteLines, read_path: ReadPath
) -> None:
    good = llava("Q", "A")
    first, record, last = read_path(write_lines([good, fields, good]))
    assert (record.sample, record.media, record.where) == (None, {}, "data.jsonl:2")
    assert (record.problem or "").startswith(problem)
    assert (first.problem, last.problem, last.index) == (None, None, 2)


def test_a_problem_is_one_short_line(write_lines: WriteLines, read_path: ReadPath) -> None:
    [record] = read_path(write_lines([{"conversations": [{"from": "x\ny" * 500, "value": ""}]}]))
    assert record.problem is not None
    assert "\n" not in record.problem
    assert len(record.problem) < 310


@pytest.mark.parametrize(
    ("fields", "id"),
    [
        ({"id": "x"}, "x"),
        ({"id": 7}, "7"),
        ({"question_id": 8}, "8"),
        ({}, "data:0"),
        ({"id": {}}, "data:0"),
        ({"id": ""}, "data:0"),
    ],
)
def test_ids_are_the_records_or_follow_from_their_place(
    fields: Fields, id: str, write_lines: WriteLines, read_path: ReadPath
) -> None:
    [record] = read_path(write_lines([llava("Q", "A", **fields)]))
    assert record.sample is not None
    assert record.sample.id == id


def test_sources_are_the_records_or_the_data_sets_name_unless_one_is_forced(
    write_lines: WriteLines, read_path: ReadPath
) -> None:
    path = write_lines(
        [llava("Q", "A", source="own"), llava("Q", "A", data_source="theirs"), llava("Q", "A", source=[1])]
    )

    def sources(**fields: Any) -> list[str]:
        return [record.sample.source for record in read_path(path, **fields) if record.sample]

    assert sources() == ["own", "theirs", "data"]
    assert sources(source="mine") == ["mine", "mine", "mine"]


def test_renamed_fields_win_over_fields_of_that_name(write_lines: WriteLines, read_path: ReadPath) -> None:
    path = write_lines([{"query": "Q", "question": "not this", "label": ["A"]}])
    [record] = read_path(path, rename={"query": "question", "label": "answers"})
    assert spoken(record) == ["Q", "A"]


def test_bytes_in_a_record_are_its_media(write_lines: WriteLines, read_path: ReadPath) -> None:
    inline = base64.b64encode(b"pixels").decode()
    path = write_lines(
        [
            llava("Q", "A", image=f"data:image/png;base64,{inline}"),
            chat([{"type": "image", "base64": inline}, TEXT], "A"),
        ]
    )
    first, second = read_path(path)
    assert [source.read() for record in (first, second) for source in record.media.values()] == [b"pixels"] * 2
    assert first.media.keys().isdisjoint(second.media)


def test_samples_of_ours_come_back_as_they_were(tmp_path: Path, read_path: ReadPath) -> None:
    def part(kind: PartType, value: str) -> Part:
        return Part(type=kind, value=value)

    question = (part("text", "is <image> "), part("image", "b.png"), part("video", "v.mp4"), part("text", "\n<video>?"))
    messages = (
        Message(role="system", content=(part("text", " be brief\n"),)),
        Message(role="user", content=question),
        Message(role="assistant", content=(part("text", " yes"),)),
        Message(role="user", content=(part("image", "a.png"), part("text", ""), part("text", "and this?"))),
        Message(role="assistant", content=(part("text", "no "),)),
    )
    sample = Sample(id="s", source="kind", messages=messages)
    write_jsonl(tmp_path / "d.jsonl", [sample])
    [record] = read_path(tmp_path / "d.jsonl")
    assert record.sample is not None
    text = json.dumps(record.sample.to_dict()).replace(f"{tmp_path}/", "")
    assert json.loads(text) == sample.to_dict()


def test_every_shape_can_be_encoded(encoder: ConversationEncoder, write_lines: WriteLines, read_path: ReadPath) -> None:
    shapes: list[Fields] = [
        {"caption": "a cat", "image": "a"},
        llava("<image>\none", "1", "two <image>", "2", images=["a", "b"]),
        chat([{"type": "image", "path": "a"}, {"type": "text", "text": "write <image> "}], "A"),
        llava("Why?", "b"),
    ]
    samples = [record.sample for record in read_path(write_lines(shapes)) if record.sample]
    assert [len(encoder(sample).images) for sample in samples] == [1, 2, 1, 0]
    for sample in samples:
        assert any(label >= 0 for label in encoder(sample).labels)
