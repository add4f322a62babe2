"""Which samples the report shows as pictures, and how images become part of the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nvila.data.media import ImageTable, write_image_table
from nvila_pipelines.report.gallery import answered, curated, samples_by_id
from nvila_pipelines.report.images import MAX_SIDE, Thumbnails, data_uri
from nvila_pipelines.report.score_summary import summarise

if TYPE_CHECKING:
    from tests.pipelines.report.conftest import MakeRun

NO_IMAGES = Thumbnails(ImageTable({}, "nowhere"))


def answer(number: int, source: str, *, correct: bool) -> dict[str, Any]:
    row = {"id": str(number), "source": source, "image": f"test/{number}", "question": f"question {number}"}
    return {**row, "answer": "yes", "prediction": "yes" if correct else "no", "correct": correct}


def test_wrong_answers_come_first_and_say_so() -> None:
    wrong, right = answered([answer(0, "a", correct=True), answer(1, "a", correct=False)], NO_IMAGES)
    assert [card.verdict for card in wrong.cards] == ["wrong"]
    assert wrong.cards[0].facts == (("answered", "no"), ("expected", "yes"))
    assert [card.verdict for card in right.cards] == ["right"]
    assert right.cards[0].facts == (("answered", "yes"),)


def test_every_kind_is_shown_however_rare() -> None:
    rows = [answer(number, "common", correct=True) for number in range(500)]
    rows.append(answer(999, "rare", correct=True))
    _, right = answered(rows, NO_IMAGES)
    sources = [card.source for card in right.cards]
    assert len(sources) == 12
    assert sources.count("rare") == 1
    assert right.text == "12 of 501 right answers, from all kinds of questions."


def test_perfect_model_has_no_wrong_answers_to_show() -> None:
    wrong, _ = answered([answer(0, "a", correct=True)], NO_IMAGES)
    assert (wrong.text, wrong.cards) == ("There is no wrong answer.", ())


def test_long_texts_are_cut() -> None:
    row = {**answer(0, "a", correct=True), "question": "why " * 500}
    _, right = answered([row], NO_IMAGES)
    assert len(right.cards[0].question) <= 280


def ends_of(deltas: dict[str, float], folder: Path) -> dict[Any, Any]:
    """Give the ends of scores with these deltas, through the files that hold them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"id": id, "source": "ab"[index % 2], "nll_small": max(delta, 0) + 0.1, "nll_large": max(-delta, 0) + 0.1}
        | {"delta": delta, "kept": delta > 0}
        for index, (id, delta) in enumerate(deltas.items())
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "scores.parquet")
    pq.write_table(pa.Table.from_pylist(rows).select(["id", "kept"]), folder / "selection.parquet")
    return dict(summarise(folder / "scores.parquet", folder / "selection.parquet").ends)


def test_curated_samples_are_the_ends_and_the_middle(make_run: MakeRun, tmp_path: Path) -> None:
    samples = samples_by_id(make_run().artifacts["data"] / "train.jsonl")
    # Neither the order of the samples nor their number gives the deltas away.
    deltas = {f"train-{number:05d}": (number * 37 % 101 - 50) / 10 for number in range(101)}
    informative, redundant, distracting = curated(ends_of(deltas, tmp_path), samples, NO_IMAGES)
    shown = [
        [float(dict(card.facts)["delta"]) for card in group.cards] for group in (informative, redundant, distracting)
    ]
    assert [len(group) for group in shown] == [6, 6, 6]
    assert shown[0][0] == 5.0
    assert shown[0] == sorted(shown[0], reverse=True)
    assert shown[1][0] == 0.0
    assert max(map(abs, shown[1])) < 1
    assert shown[2][0] == -5.0
    assert shown[2] == sorted(shown[2])
    assert all({card.source for card in group.cards} == {"a", "b"} for group in (informative, redundant, distracting))
    assert dict(informative.cards[0].facts)["likely to large"] == "90.5 %"
    assert dict(informative.cards[0].facts)["likely to small"] == "0.6 %"


def test_samples_that_are_not_negative_are_not_called_distracting(make_run: MakeRun, tmp_path: Path) -> None:
    samples = samples_by_id(make_run().artifacts["data"] / "train.jsonl")
    groups = curated(ends_of({"train-00000": 0.5}, tmp_path), samples, NO_IMAGES)
    assert [len(group.cards) for group in groups] == [1, 1, 0]


def test_image_that_cannot_be_decoded_leaves_a_placeholder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_image_table(tmp_path / "images.parquet", [("test/0", b"<svg onload=alert(1)>")])
    images = Thumbnails(ImageTable.open(tmp_path / "images.parquet"))
    _, right = answered([answer(0, "a", correct=True)], images)
    assert (right.cards[0].image, right.cards[0].alt) == ("", "image test/0 cannot be shown")
    assert "test/0" in caplog.text


@pytest.mark.parametrize(
    ("size", "kind", "expected"),
    [((64, 64), "png", (64, 64)), ((2000, 1000), "jpeg", (MAX_SIDE, MAX_SIDE // 2))],
    ids=["small-is-exact", "large-is-scaled"],
)
def test_images_become_small_data_uris(size: tuple[int, int], kind: str, expected: tuple[int, int]) -> None:
    from PIL import Image

    uri = data_uri(Image.effect_noise(size, 90).convert("RGB"))
    prefix = f"data:image/{kind};base64,"
    assert uri.startswith(prefix)
    assert Image.open(io.BytesIO(base64.b64decode(uri.removeprefix(prefix)))).size == expected
    assert len(uri) < 40_000
