"""From rows to questions: choices, answers, pictures at their places, videos, subtitles, and rows that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nvila.data.readers.locations import locate
from nvila.errors import DataError
from nvila.evaluation.asking import Asker, Question
from nvila.evaluation.fixtures import clip, picture
from nvila.evaluation.rows import TaskRows
from nvila.evaluation.subtitles import read_subtitles, shown_at

if TYPE_CHECKING:
    from tests.model.evaluation.conftest import MakeTask

    from nvila.evaluation.task import Task

CHOICE = {"fields": {"question": "q", "answer": "a", "choices": "c"}, "prompt": "{question}\n{choices}"}


def ask(task: Task, fields: dict[str, Any], home: Path | None = None) -> Question:
    rows = TaskRows(
        name="demo", read=lambda columns: iter(()), count=lambda: 0, home=locate(str(home)) if home else None
    )
    return Asker(task, rows).question(3, fields)


def test_a_question_knows_its_row(make_task: MakeTask) -> None:
    task = make_task(fields={"question": "q", "answer": "a", "kind": "k"}, group_by="kind")
    question = ask(task, {"q": "why?", "a": "so", "k": 7, "id": "x"})
    assert (question.index, question.id, question.group, question.prompt) == (3, "x", "7", "why?")
    assert ask(task, {"q": "why?", "a": "so", "k": 7}).id == "3"


@pytest.mark.parametrize(
    "fields",
    [
        {"q": "which?", "a": "B", "c": ["red", "blue"]},
        {"q": "which?", "a": "blue", "c": "['red', 'blue']"},
        {"q": "which?", "a": "B", "c": ["A. red", "B. blue"]},
        {"q": "which?", "a": "B", "c": ["(A) red", "(B) blue"]},
        {"q": "which?", "a": "B", "c": [" red ", None, "blue", "N/A"]},
    ],
)
def test_choices(make_task: MakeTask, fields: dict[str, Any]) -> None:
    question = ask(make_task(**CHOICE, scorer="multiple_choice", no_choice="N/A"), fields)
    assert question.prompt == "which?\nA. red\nB. blue"
    assert question.reference["choices"] == ["red", "blue"]


def test_choices_in_columns_and_an_index(make_task: MakeTask) -> None:
    task = make_task(
        fields={"question": "q", "answer": "a", "choices": ["c0", "c1"]},
        prompt="{question} {choices}",
        choice_line="({letter}) {text}",
        answer_is="index",
        scorer="multiple_choice",
    )
    question = ask(task, {"q": "which?", "a": "1", "c0": "red", "c1": "blue"})
    assert (question.prompt, question.reference["answer"]) == ("which? (A) red\n(B) blue", "B")
    for answer in (2, -1, "x", None):
        with pytest.raises(DataError, match="no index of 2 choices"):
            ask(task, {"q": "which?", "a": answer, "c0": "red", "c1": "blue"})


@pytest.mark.parametrize(
    ("choices", "message"), [("red", "are no list"), (3, "are a int"), ([str(n) for n in range(27)], "27 choices")]
)
def test_choices_that_are_none(make_task: MakeTask, choices: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ask(make_task(**CHOICE, scorer="mmmu"), {"q": "?", "a": "A", "c": choices})


def test_open_questions_have_a_prompt_of_their_own(make_task: MakeTask) -> None:
    task = make_task(**CHOICE | {"prompt_open": "{question} In a word."}, scorer="mmmu")
    choices: Any
    for choices in ("[]", None, []):
        assert ask(task, {"q": "why?", "a": "so", "c": choices}).prompt == "why? In a word."


def test_optional_fields(make_task: MakeTask) -> None:
    task = make_task(
        fields={"question": "q", "answer": "a", "hint": "h"},
        prompt="{hint}{question}",
        optional={"hint": "Hint: {hint}\n"},
    )
    assert ask(task, {"q": "why?", "a": "so", "h": "think"}).prompt == "Hint: think\nwhy?"
    assert ask(task, {"q": "why?", "a": "so", "h": None}).prompt == "why?"


def test_braces_in_the_data_are_text(make_task: MakeTask) -> None:
    assert ask(make_task(), {"q": "what is {answer}?", "a": "so"}).prompt == "what is {answer}?"


def test_spans_and_constants(make_task: MakeTask) -> None:
    task = make_task(answer_is="span", constants={"duration": 8.0}, scorer="temporal")
    assert ask(task, {"q": "when?", "a": "<2.5> <4>"}).reference["answer"] == [2.5, 4.0]
    with pytest.raises(DataError, match="is no span"):
        ask(task, {"q": "when?", "a": "early"})


def test_a_wrong_reference_shows_before_anything_is_asked(make_task: MakeTask) -> None:
    with pytest.raises(DataError, match="holds nothing"):
        ask(make_task(), {"q": "why?", "a": None})


def test_images_as_bytes_structs_paths_and_lists(make_task: MakeTask, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(picture("x"))
    task = make_task(images=["i", "j"])
    cell: Any
    for cell in (picture("x"), {"bytes": picture("x"), "path": None}, {"bytes": None, "path": "x.png"}, "x.png"):
        question = ask(task, {"q": "?", "a": "x", "i": [cell, cell], "j": None}, tmp_path)
        assert [piece.kind for piece in question.pieces] == ["image", "image", "text"]
        assert question.pieces[0].value == picture("x")
    for cell, message in ((7, "an image is a int"), ("../x.png", "leads out"), ("none.png", "none.png")):
        with pytest.raises(DataError, match=message):
            ask(task, {"q": "?", "a": "x", "i": cell, "j": None}, tmp_path)


def test_image_files_named_by_a_column(make_task: MakeTask, tmp_path: Path) -> None:
    (tmp_path / "n7.jpg").write_bytes(b"7")
    task = make_task(images=["{n}.jpg"])
    assert task.columns == ["q", "a", "n"]
    assert ask(task, {"q": "?", "a": "x", "n": "n7"}, tmp_path).pieces[0].value == b"7"


def test_images_at_their_places(make_task: MakeTask) -> None:
    task = make_task(images=["i", "j", "k"], interleave=True)
    fields = {"a": "x", "i": b"1", "j": b"2", "k": None}
    question = ask(task, fields | {"q": "Is <image 2> above <image 1>? <image 2> is new."})
    assert [piece.value for piece in question.pieces] == ["Is ", b"2", " above ", b"1", "? <image 2> is new."]
    assert len(ask(task, fields | {"q": "no picture"}).pieces) == 1
    for place in ("<image 3>", "<image 0>"):
        with pytest.raises(DataError, match="there are 2 images"):
            ask(task, fields | {"q": place})


def test_the_first_video_that_exists_is_taken(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(videos=["v/{v}.mp4", "v/{v}.mkv"])
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mkv").write_bytes(clip(["red"]))
    assert ask(task, {"q": "?", "a": "x", "v": "a"}, tmp_path).pieces[0].value == tmp_path / "v" / "a.mkv"
    with pytest.raises(DataError) as caught:
        ask(task, {"q": "?", "a": "x", "v": "b"}, tmp_path)
    assert "v/b.mp4 does not exist" in caught.value.message
    assert "v/b.mkv" in caught.value.hint
    with pytest.raises(DataError, match="leads out"):
        ask(task, {"q": "?", "a": "x", "v": "../../a"}, tmp_path)
    with pytest.raises(DataError, match="not on this machine"):
        ask(task, {"q": "?", "a": "x", "v": "a"})


def test_the_digest_follows_texts_media_and_reference(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(images=["i"])
    base = {"q": "?", "a": "x", "i": b"1"}
    digest = ask(task, base).digest
    assert ask(task, dict(base)).digest == digest
    for changed in ({"q": "!"}, {"a": "y"}, {"i": b"2"}):
        assert ask(task, base | changed).digest != digest


def test_a_video_is_known_by_its_bytes(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(videos=["{v}"])

    def digest(content: bytes) -> str:
        (tmp_path / "a.mp4").write_bytes(content)
        return ask(task, {"q": "?", "a": "x", "v": "a.mp4"}, tmp_path).digest

    long = bytes(3 * 2**20)
    assert digest(long) == digest(long)
    assert len({digest(long), digest(long + b"1"), digest(b"1" + long[1:]), digest(long[:-1] + b"1")}) == 4
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "1.png").write_bytes(picture("1"))
    assert ask(task, {"q": "?", "a": "x", "v": "frames"}, tmp_path).digest


def test_subtitles(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(
        videos=["{v}.mp4"],
        subtitles="{v}.srt",
        prompt="{subtitles}{question}",
        optional={"subtitles": "Said: {subtitles}\n"},
        generation={"num_frames": 3},
    )
    (tmp_path / "a.mp4").write_bytes(clip(["red", "green"]))
    assert ask(task, {"q": "?", "a": "x", "v": "a"}, tmp_path).prompt == "<video>?"
    blocks = (
        "\ufeff1\r\n00:00:00,000 --> 00:00:00,5\r\n<i>One\r\n line</i>",
        "noise",
        "2\r\n00:10:00.000 --> 00:10:01.000\r\nlate\r\n",
    )
    text = "\r\n\r\n".join(blocks)
    (tmp_path / "a.srt").write_text(text, encoding="utf-8")
    question = ask(task, {"q": "?", "a": "x", "v": "a"}, tmp_path)
    assert question.prompt == "<video>Said: One line\n?"
    assert len(question.pieces[0].value) == 3
    lines = read_subtitles(tmp_path / "a.srt")
    assert [(line.start, line.end, line.text) for line in lines] == [(0.0, 0.5, "One line"), (600.0, 601.0, "late")]
    assert shown_at(lines, [0.5, 600.0, 600.5]) == ["late"]
    (tmp_path / "a.srt").write_text("no subtitles")
    with pytest.raises(DataError, match="holds no subtitles"):
        ask(task, {"q": "?", "a": "x", "v": "a"}, tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        read_subtitles(tmp_path / "none.srt")
