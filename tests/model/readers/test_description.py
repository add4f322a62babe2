"""What is in a data set, counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nvila.data.readers.description import EXAMPLES, describe

if TYPE_CHECKING:
    from tests.model.readers.conftest import OpenPath, WriteLines


def test_sources_media_and_problems_are_counted(write_lines: WriteLines, open_path: OpenPath) -> None:
    def vqa(**fields: Any) -> dict[str, Any]:
        return {"question": "Q", "answer": "A", **fields}

    rows = [
        vqa(),
        vqa(source="other", image="1.png"),
        vqa(images=["1.png", "2.png"]),
        vqa(video="1.mp4"),
        vqa(video="1.mp4", images=["1.png", "2.png"]),
        {"texts": [{"user": "Q", "assistant": "A"}] * 2},
        "{",
    ]
    stream = open_path(write_lines(rows))
    found = describe(stream)
    assert (found.name, found.num_records, found.num_problems, found.complete) == ("data", 7, 1, True)
    assert found.sources == {"data": 5, "other": 1}
    assert found.media == {"text": 2, "image": 1, "images": 1, "video": 1, "images and video": 1}
    assert found.num_turns == 14
    assert [(record.where, (record.problem or "")[:11]) for record in found.problems] == [
        ("data.jsonl:7", "broken JSON")
    ]


def test_a_limit_says_whether_there_is_more(write_lines: WriteLines, open_path: OpenPath) -> None:
    stream = open_path(write_lines(["{"] * 10))
    few, all_of_them = describe(stream, 8), describe(stream, 10)
    assert (few.num_records, few.num_problems, few.complete, len(few.problems)) == (8, 8, False, EXAMPLES)
    assert (all_of_them.num_records, all_of_them.complete) == (10, True)
