"""What `nvila curate` reads: every format gives the same scores, every kind of record one, a bad one its reason."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

Curate = Callable[..., int]
TURNS = "conversations"


def scores(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(out / "scores.parquet").to_pylist()
    return found


def quarantine(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def score(curate: Curate, models: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Curate a data set into a folder of that name."""

    def run(data: Path, *words: str) -> Path:
        given = ["--small", models["small"], "--large", models["large"], "--threads", "1", "--max-bad", "100%"]
        assert curate(data, *given, *words, "--out", f"out-{data.name}") == 0
        return tmp_path / f"out-{data.name}"

    return run


def write_formats(lines: Path, folder: Path) -> list[Path]:
    """Write the records of a LLaVA file in every other format."""
    import datasets

    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    inside = [row | {"image": (lines.parent / row["image"]).read_bytes()} for row in rows]
    (lines.parent / "array.json").write_text(json.dumps(rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(inside), folder / "rows.parquet", row_group_size=5)
    datasets.Dataset.from_list(inside).save_to_disk(folder / "saved")
    (folder / "tars").mkdir()
    for number in range(2):
        with tarfile.open(folder / "tars" / f"{number}.tar", "w") as archive:
            for index in range(6 * number, 6 * number + 6):
                text = json.dumps({name: value for name, value in rows[index].items() if name != "image"}).encode()
                for suffix, data in (("png", inside[index]["image"]), ("json", text)):
                    info = tarfile.TarInfo(f"{index:03d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return [lines.parent / "array.json", folder / "rows.parquet", folder / "saved", folder / "tars"]


def test_every_format_gives_the_same_scores(score: Any, llava: Any, tmp_path: Path) -> None:
    lines = llava(12)
    expected = scores(score(lines))
    assert {row["status"] for row in expected} == {"ok"}
    for data in write_formats(lines, tmp_path):
        assert scores(score(data)) == expected, data.name


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def film() -> bytes:
    import av
    import numpy as np

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(20):
            frame = np.full((32, 32, 3), 12 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


def test_every_kind_of_record_has_a_score_and_a_place_in_the_report(score: Any, llava: Any) -> None:
    folder = llava(6).parent
    (folder / "film.mp4").write_bytes(film())
    rows: list[dict[str, Any]] = [
        {"id": "image", "image": "images/0.png", TURNS: chat("<image>\nwhat shape?", "circle")},
        {"id": "two", "images": ["images/0.png", "images/1.png"], TURNS: chat("<image>, <image>?", "no")},
        {"id": "video", "video": "film.mp4", TURNS: chat("<video>\nis there a red circle?", "yes")},
        {"id": "text", TURNS: chat("is there a red circle?", "no")},
        {"id": "turns", "image": "images/1.png", TURNS: chat("<image>\ncolor?", "red", "shape?", "circle")},
        # Of another shape, and with fields that mean nothing here.
        {"id": "pair", "image": "images/1.png", "question": "what color?", "answer": "red", "mood": {"x": 1}},
        {"id": "chat", "messages": [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "yes"}]},
    ]  # fmt: skip
    (folder / "kinds.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = score(folder / "kinds.jsonl", "--keep-rate", "1")
    found = scores(out)
    assert [(row["id"], row["status"]) for row in found] == [(row["id"], "ok") for row in rows]
    # Both answers of a conversation count, with the ends of their turns.
    assert [row["num_answer_tokens"] for row in found] == [2, 2, 2, 2, 4, 2, 2]
    assert all(row["delta"] == row["nll_small"] - row["nll_large"] != 0 for row in found)
    page = (out / "report.html").read_text(encoding="utf-8")
    # An image, two images, the first frame of a film, and no picture at all.
    assert page.count("data:image/png;base64") >= 5
    assert json.loads((out / "ignore" / "kinds.json").read_text()) == []


def test_every_bad_record_is_named_with_its_reason(score: Any, llava: Any) -> None:
    folder = llava(6).parent
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "images" / "0.png").read_bytes()[:200])
    (folder / "cut.mp4").write_bytes(film()[:700])
    good = chat("<image>\nwhat color is the shape?", "red")
    picture = {"image": "images/0.png"}
    cases: list[tuple[Any, str, str]] = [
        ({"id": "a", **picture, TURNS: good}, "ok", ""),
        ({"id": "gone", "image": "images/none.png", TURNS: good}, "bad_media", "none.png does not exist"),
        ({"id": "text", "image": "text.png", TURNS: good}, "bad_media", "is not an image that can be read"),
        ({"id": "cut", "image": "cut.png", TURNS: good}, "bad_media", "cannot be decoded"),
        ({"id": "film", "video": "cut.mp4", TURNS: chat("<video>\nred?", "no")}, "bad_media", "video"),
        ({"id": "a", **picture, "question": "again?", "answer": "no"}, "duplicate", "record 0 (bad.jsonl:1) has"),
        ({"id": "ask", **picture, TURNS: good[:1]}, "no_answer", "the last turn is not the assistant's"),
        ({"id": "empty", **picture, TURNS: chat("<image>\nq", " ")}, "no_answer", "no answer: turn 2 is empty"),
        ({"id": "none", **picture, "question": "q"}, "no_answer", "'answer' and 'answers' are missing"),
        ({"id": "long", TURNS: chat("q", "red " * 200)}, "too_long", "small model: 2"),
        ({"id": "odd", "mood": 1}, "unreadable", "no conversation: expected conversations, messages"),
        ({"id": "far", "image": "../../x.png", TURNS: good}, "unreadable", "leads out of"),
    ]  # fmt: skip
    lines = [json.dumps(record) for record, *_ in cases]
    (folder / "bad.jsonl").write_text("\n".join([*lines, "{broken", ""]), encoding="utf-8")
    out = score(folder / "bad.jsonl")
    cases.append((None, "unreadable", "broken JSON"))
    assert [row["status"] for row in scores(out)] == [status for _, status, _ in cases]
    bad = [(number, status, reason) for number, (_, status, reason) in enumerate(cases) if status != "ok"]
    for line, (number, status, reason) in zip(quarantine(out), bad, strict=True):
        assert (line["index"], line["where"], line["status"]) == (number, f"bad.jsonl:{number + 1}", status)
        assert reason in line["reason"], line


def test_a_truncated_tar_costs_what_it_lacks(score: Any, llava: Any, tmp_path: Path) -> None:
    *_, tars = write_formats(llava(12), tmp_path)
    cut = tars / "0.tar"
    cut.write_bytes(cut.read_bytes()[: len(cut.read_bytes()) // 2])
    out = score(tars)
    (line,) = quarantine(out)
    assert (line["where"], line["status"]) == ("0.tar:end", "unreadable")
    assert line["reason"].startswith("the tar file breaks off here: ")
    assert [row["id"] for row in scores(out) if row["status"] == "ok"][-6:] == [f"q{index}" for index in range(6, 12)]


@pytest.mark.parametrize("option", ["--sequential", "--dtype"])
def test_how_is_scored_changes_little_or_nothing(option: str, score: Any, llava: Any) -> None:
    data = llava(9)
    plain = scores(score(data))
    again = data.with_name("again.jsonl")
    again.write_bytes(data.read_bytes())
    other = scores(score(again, *([option, "bf16"] if option == "--dtype" else [option])))
    for one, two in zip(plain, other, strict=True):
        if option == "--sequential":
            assert one == two
        else:
            assert one["nll_large"] != two["nll_large"]
            assert two["nll_large"] == pytest.approx(one["nll_large"], rel=0.1)
