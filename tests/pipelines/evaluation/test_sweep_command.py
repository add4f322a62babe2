"""`nvila sweep`: points on data of one's own and on tasks, interruption, what does not apply, the page, wrong use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nvila.evaluation.fixtures import picture

if TYPE_CHECKING:
    from tests.pipelines.conftest import Nvila

QUICK = ("--threads", "1", "--probes", "1")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Questions about pictures, as people have them; the last is a conversation of two turns."""
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = []
    for n in range(4):
        (folder / f"{n}.png").write_bytes(picture(str(n)))
        turns = [{"from": "human", "value": "<image>\nis there a circle?"}, {"from": "gpt", "value": "yes"}]
        lines.append({"id": f"s{n}", "image": f"{n}.png", "conversations": turns * (2 if n == 3 else 1)})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_points_are_measured_once(nvila: Nvila, model_folder: Path, mine: Path) -> None:
    tried = ("--tilings", "resize,dynamic:4,dynamic_s2:9", "--forms", "stored,int8")
    words = ("sweep", model_folder, mine, *tried, "--max-failed", "30%", *QUICK)
    done = nvila(*words, "--out", "swept", "--json")
    assert done.code == 0, done.err
    found = done.last_json
    assert [point["name"] for point in found["points"]] == [
        f"{tiling}, {form}" for form in ("stored", "int8") for tiling in ("resize", "dynamic:4")
    ]
    for point in found["points"]:
        assert point["samples"] == 3
        assert point["failed"] == 1  # the one with two turns
        assert point["low"] <= point["value"] <= point["high"]
    by_name = {point["name"]: point["cost"] for point in found["points"]}
    assert by_name["resize, stored"]["tokens"] == 4
    assert by_name["dynamic:4, stored"]["tokens"] > 4
    assert by_name["resize, int8"]["memory_mib"] < by_name["resize, stored"]["memory_mib"]
    assert found["fronts"].keys() == {"ttft", "tokens", "memory"}
    assert any(one["setting"] == "tiling dynamic_s2:9" for one in found["left_out"])
    # A point that is missing is measured again, the others are not.
    files = sorted(Path("swept/points").glob("*.json"))
    assert len(files) == 4
    texts = {file: file.read_text() for file in files}
    files[0].unlink()
    again = nvila(*words, "--out", "swept")
    assert again.code == 0, again.err
    assert [file for file in files if file.read_text() != texts[file]] in ([], files[:1])
    head, *lines = again.out.splitlines()
    assert head.split() == ["point", "exact_match", "95%", "interval", "tokens", "first", "token", "memory"]
    assert sum("<- recommended" in line for line in lines) == 1
    assert any(line.startswith("Take ") for line in lines)
    assert any(line.startswith("not applicable: tiny, tiling dynamic_s2:9") for line in lines)
    page = Path(lines[-1].removeprefix("page: ")).read_text()
    assert page.count("<svg") == 3
    assert "dynamic:4, int8" in page
    assert "<script" not in page
    assert "https://" not in page
    # Other samples are other points.
    nvila(*words, "--out", "swept", "--limit", "2")
    assert len(list(Path("swept/points").glob("*.json"))) == 8


def test_videos_have_frames_and_pooling_and_what_does_not_fit_is_told(
    nvila: Nvila, model_folder: Path, short_model_folder: Path
) -> None:
    words = ("digit_clips", "--frames", "4,8", "--pools", "1,4", "--forms", "stored", "--limit", "2", *QUICK)
    done = nvila("sweep", model_folder, *words, "--with", short_model_folder, "--cost", "tokens", "--json")
    assert done.code == 0, done.err
    points = done.last_json["points"]
    tokens = {(p["model"], p["point"]["frames"], p["point"]["pool"][0]): p["cost"]["tokens"] for p in points}
    assert tokens["tiny", 8, 1] == 32
    assert tokens["tiny", 8, 4] == 8
    # The other model has room for four frames, or eight that are pooled.
    assert {key[1:] for key in tokens if key[0] == "short"} == {(4, 1), (4, 4), (8, 4)}
    [refused] = done.last_json["cannot_run"]
    assert (refused["model"], "context 48" in refused["why"]) == ("short", True)
    chosen = points[done.last_json["recommended"]["point"]]
    assert chosen["cost"]["tokens"] == 4
    table = nvila("sweep", model_folder, *words, "--with", short_model_folder, "--cost", "tokens").out
    assert "cannot be run: short, 8 frames, pool 1x1x1, stored: the prompt has" in table
    assert table.splitlines()[0].startswith("model ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "1 words are given"),
        (["nowhere.jsonl"], "nowhere.jsonl"),
        (["easy_vqa", "--scorer", "anls"], "--scorer is about data that is no task"),
        (["mine", "--data", "x"], "--data is about a task, and there is none 'mine'"),
        (["chartqa"], "--data chartqa=FOLDER"),
        (["mine", "--scorer", "anlz"], "did you mean 'anls'?"),
        (["mine", "--scorer", "temporal"], "needs the field 'duration'"),
        (["mine", "--frames", "x"], "--frames: 'x' is no positive whole number"),
        (["mine", "--pools", "0"], "is no pooling"),
        (["mine", "--forms", ","], "--forms is empty"),
        (["mine", "--forms", "int9"], "there is no form 'int9'"),
        (["mine", "--loss", "x"], "is no number of points"),
        (["mine", "--with", "MODEL"], "the same model is named twice"),
        (["mine", "--with", "http://127.0.0.1:1"], "is an endpoint"),
    ],
)
def test_wrong_use(nvila: Nvila, model_folder: Path, mine: Path, words: list[str], message: str) -> None:
    done = nvila("sweep", model_folder, *(str(model_folder) if word == "MODEL" else word for word in words))
    assert done.code in (1, 2)
    assert message in done.err
    assert "unexpected" not in done.err


def test_data_without_a_question_is_named(nvila: Nvila, model_folder: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "hello?"}, {"from": "gpt", "value": "yes"}] * 2
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", "conversations": turns}) + "\n")
    done = nvila("sweep", model_folder, "rows.jsonl", *QUICK)
    assert done.code == 1
    assert "no sample of rows.jsonl can be asked: it is no question with an answer" in done.err
