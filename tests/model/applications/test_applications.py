"""Navigation and medical applications: parsers, generated data, the two-pass loop, scorers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nvila.applications import experts, navigation
from nvila.applications.experts import ExpertRegistry, Trigger, consult, draw_cells, parse_trigger, segment_cells
from nvila.applications.navigation import Action, parse_action, sample_frames
from nvila.data.mixtures import Registry
from nvila.errors import ConfigError, DataError
from nvila.evaluation.scorers.actions import expert_trigger, navigation_action
from nvila.evaluation.scorers.temporal import time_span


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("Turn left by 15 degrees.", Action("left", 1)),
        ("turn right 44 deg", Action("right", 3)),
        ("move forward 75 cm", Action("forward", 3)),
        ("walk forward 1 m, then stop", Action("forward", 4)),
        ("stop", Action("stop")),
        ("move forward 5 cm", None),
        ("move forward 90 m", None),
        ("nonstop", None),
        ("I do not know", None),
    ],
)
def test_sentences_become_discrete_actions(text: str, action: Action | None) -> None:
    assert parse_action(text) == action


def test_frames_are_even_with_the_current_one_last() -> None:
    assert sample_frames(8) == list(range(8))
    long = sample_frames(100)
    assert (long[0], long[-1], len(long)) == (0, 99, 8)
    assert sample_frames(3) == [0, 0, 0, 0, 0, 0, 1, 2]
    with pytest.raises(DataError, match="no frames"):
        sample_frames(0)


def test_navigation_data_has_eight_frames_and_an_action_each(tmp_path: Path) -> None:
    file = navigation.write_data(tmp_path, 12)
    records = list(Registry().open(str(file)).records())
    assert len(records) == 12
    for record in records:
        assert record.sample is not None, record.problem
        assert len(record.sample.images) == 8
        assert parse_action(record.sample.answer) is not None
    again = navigation.write_data(tmp_path / "again", 12)
    assert again.read_text() == file.read_text()


def test_actions_are_scored_after_they_became_discrete() -> None:
    reference = {"answer": "turn left 30 degrees"}
    assert navigation_action("turn left 28 degrees", reference)["action"] == 1.0
    near = navigation_action("turn left 45 degrees", reference)
    assert (near["action"], near["direction"]) == (0.0, 1.0)
    assert navigation_action("stop", reference)["direction"] == 0.0
    with pytest.raises(DataError, match="names no action"):
        navigation_action("stop", {"answer": "yes"})


@pytest.mark.parametrize(
    ("text", "trigger"),
    [
        ("<CELLS(count)>", Trigger("CELLS", ("count",))),
        ("let me see <VISTA3D(hepatic tumor, spleen)> now", Trigger("VISTA3D", ("hepatic tumor", "spleen"))),
        ("<CXR()>", Trigger("CXR")),
        ("<cells(count)>", None),
        ("<CELLS(count)", None),
        ("CELLS(count)", None),
    ],
)
def test_triggers_are_read(text: str, trigger: Trigger | None) -> None:
    assert parse_trigger(text) == trigger


@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_local_expert_counts_cells_and_marks_them(count: int) -> None:
    picture = draw_cells(random.Random(count), count)
    found = segment_cells(picture)
    assert found.text == f"the expert found {experts.number_word(count)} cells."
    assert found.picture is not None
    pixels = np.asarray(found.picture)
    assert int(((pixels[..., 1] > 150) & (pixels[..., 0] < 100)).sum()) > 40 * count


def test_an_empty_picture_has_no_cells() -> None:
    from PIL import Image

    assert segment_cells(Image.new("RGB", (64, 64), "white")).text == "the expert found no cells."


def test_the_finding_of_an_expert_comes_back_as_a_turn() -> None:
    picture = draw_cells(random.Random(0), 4)
    chats: list[list[dict[str, Any]]] = []

    def answer(chat: list[dict[str, Any]]) -> str:
        chats.append(list(chat))
        return "<CELLS(count)>" if len(chat) == 1 else f"so it is {chat[-1]['content'][-1]['text'].split()[3]}"

    done = consult(answer, experts.LOCAL_EXPERTS, picture, "how many cells are there?")
    assert done.answer == "so it is four"
    assert done.trigger == Trigger("CELLS", ("count",))
    assert [turn["role"] for turn in chats[1]] == ["user", "assistant", "user"]
    assert chats[1][2]["content"][0]["type"] == "image"


def test_answers_without_a_known_expert_stand() -> None:
    picture = draw_cells(random.Random(0), 2)
    plain = consult(lambda chat: "two", experts.LOCAL_EXPERTS, picture, "how many?")
    assert (plain.answer, plain.trigger) == ("two", None)
    unknown = consult(lambda chat: "<NOBODY(x)>", experts.LOCAL_EXPERTS, picture, "how many?")
    assert unknown.answer == "<NOBODY(x)>"
    assert unknown.finding is None
    with pytest.raises(ConfigError, match="no expert CELS"):
        experts.LOCAL_EXPERTS.ask(Trigger("CELS"), picture)
    with pytest.raises(ConfigError, match="two experts"):
        ExpertRegistry([experts.CELLS, experts.CELLS])
    assert "<CELLS(args)>" in experts.LOCAL_EXPERTS.prompt()


def test_medical_data_has_the_trigger_and_the_answer_behind_it(tmp_path: Path) -> None:
    file = experts.write_data(tmp_path, 5)
    records = [record.sample for record in Registry().open(str(file)).records()]
    assert [sample.source for sample in records if sample] == ["trigger", "answer"] * 5
    for call, whole in zip(records[::2], records[1::2], strict=True):
        assert call is not None
        assert whole is not None
        assert parse_trigger(call.answer) == Trigger("CELLS", ("count",))
        assert whole.answer in whole.messages[2].text
        assert len(whole.images) == 2
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_triggers_and_answers_are_scored_apart() -> None:
    assert expert_trigger("<CELLS(count)>", {"answer": "<CELLS(count)>"})["triggers"] == 1.0
    assert expert_trigger("<CELLS()>", {"answer": "<CELLS(count)>"})["accuracy"] == 0.0
    assert expert_trigger("Four.", {"answer": "four"})["answers"] == 1.0


def test_spans_of_time_tokens_are_compared() -> None:
    assert time_span("<t10> <t20>", {"answer": "<t10> <t20>"})["iou"] == 1.0
    half = time_span("<t10> <t15>", {"answer": "<t10> <t20>"})
    assert half["iou"] == pytest.approx(0.5)
    assert half["hit"] == 1.0
    assert time_span("later", {"answer": "<t0> <t9>"})["iou"] == pytest.approx(9 / 99)
    with pytest.raises(DataError, match="no two time tokens"):
        time_span("<t1>", {"answer": "at once"})
