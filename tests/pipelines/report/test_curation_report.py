"""The page of a curated data set: whole, escaped, the same numbers as the files, and plots that stand alone."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nvila.curation.choosing import SourceCount
from nvila.data.readers.record import Record
from nvila.data.records import Message, Part, Sample, vqa_sample
from nvila.errors import ArtifactError
from nvila_pipelines.report.curation_report import write_curation_report
from nvila_pipelines.report.score_summary import BINS, summarise

ATTACK = "<script>alert('x')</script>"


class Stream:
    """Samples with a picture each, the third of which cannot be read."""

    name = "memory"

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        for index in range(start, min(40, 40 if stop is None else stop)):
            question = ATTACK if index == 39 else f"question {index}?"
            sample = vqa_sample(id=f"q{index}", source="a", image=f"{index}.png", question=question, answer="yes")
            yield Record(index=index, where="", sample=sample, media={f"{index}.png": Picture(broken=index == 38)})


class Picture:
    def __init__(self, *, broken: bool) -> None:
        self.broken = broken

    def read(self) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (16, 16), (200, 30, 30)).save(out, "PNG")
        return b"broken" if self.broken else out.getvalue()


def scored(out: Path) -> Path:
    """Write the files of a selection of 40 records, one of them without a score."""
    rows = [
        {"id": f"q{index}", "source": ("a", ATTACK)[index % 2], "nll_small": 4.0 + index / 10, "nll_large": 5.0}
        | {"delta": index / 10 - 2.0, "num_answer_tokens": 2, "status": "ok", "kept": index >= 20}
        for index in range(40)
    ]
    rows[5] |= {"nll_small": None, "nll_large": None, "delta": None, "status": "bad_media"}
    table = pa.Table.from_pylist(rows)
    pq.write_table(table.drop(["kept"]), out / "scores.parquet")
    pq.write_table(table.select(["id", "source", "delta", "kept"]), out / "selection.parquet")
    bad = {"index": 5, "id": "q5", "source": ATTACK, "where": "x.jsonl:6", "status": "bad_media", "reason": ATTACK}
    (out / "quarantine.jsonl").write_text(json.dumps(bad) + "\n", encoding="utf-8")
    return out


def page(out: Path, stream: Any) -> str:
    counts = {"a": SourceCount(records=20, scored=20, kept=10, boundary=0.0)}
    counts[ATTACK] = SourceCount(records=20, scored=19, kept=10, boundary=0.1)
    path = write_curation_report(
        out,
        name=ATTACK,
        method="deltaloss, keep 0.5",
        sources=counts,
        statuses={"ok": 39, "bad_media": 1},
        stream=stream,
        made={"data": ATTACK},
    )
    return path.read_text(encoding="utf-8")


def test_the_page_needs_nothing_and_escapes_everything(tmp_path: Path) -> None:
    html = page(scored(tmp_path), Stream())
    assert "<script" not in html
    assert "default-src 'none'" in html
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org/", "")
    assert "20 of 40 records" in html
    assert html.count("<figure") == 3
    assert "data:image/png;base64" in html
    assert "image 38.png cannot be shown" in html
    assert "an image or video is missing" in html
    assert "x.jsonl:6: &lt;script&gt;" in html


def test_the_ends_are_shown_with_both_likelihoods(tmp_path: Path) -> None:
    html = page(scored(tmp_path), Stream())
    informative = html.partition("Most informative")[2].partition("Redundant")[0]
    first = informative.partition("</li>")[0]
    assert "&lt;script&gt;" in first
    assert "+1.900" in first
    assert "e^-7.9" in first, "4.0 + 39 / 10"
    assert "0.7 %" in first, "exp(-5)"
    distracting = html.partition("Distracting")[2].partition("</li>")[0]
    assert "-2.000" in distracting


def test_several_pictures_and_answers_of_one_sample_are_shown(tmp_path: Path) -> None:
    names = [f"folder/{number}.png" for number in range(6)]

    class Pages(Stream):
        def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
            for record in super().records(start, stop):
                images = tuple(Part(type="image", value=name) for name in names)
                messages = (
                    Message(role="user", content=(*images, Part(type="text", value="first?"))),
                    Message(role="assistant", content=(Part(type="text", value="one"),)),
                    Message(role="user", content=(Part(type="text", value="second?"),)),
                    Message(role="assistant", content=(Part(type="text", value="two"),)),
                )
                media = {name: Picture(broken=name == names[1]) for name in names}
                yield replace(record, sample=Sample(id="x", source="a", messages=messages), media=media)

    card = page(scored(tmp_path), Pages()).partition('<li class="card')[2].partition("</li>")[0]
    assert card.count("<img") == 3
    assert '<div class="noimage">image folder/1.png cannot be shown</div>' in card
    assert "<dt>pictures</dt><dd>4 of 6</dd>" in card
    assert "<dt>answers</dt><dd>one / two</dd>" in card


def test_without_the_data_there_are_no_samples_but_the_rest(tmp_path: Path) -> None:
    html = page(scored(tmp_path), None)
    assert html.count("<figure") == 3
    assert "data:image" not in html


def test_plots_are_files_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "delta-09-gone.svg").touch()
    page(scored(tmp_path), None)
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["delta-00-script-alert-x-script.svg", "delta-01-a.svg", "likelihoods.svg"]
    for path in (tmp_path / "plots").iterdir():
        text = path.read_text(encoding="utf-8")
        ElementTree.fromstring(text)  # noqa: S314  # our own
        assert "var(" not in text


def test_the_summary_counts_every_record_once(tmp_path: Path) -> None:
    out = scored(tmp_path)
    summary = summarise(out / "scores.parquet", out / "selection.parquet")
    assert (summary.records, summary.kept, summary.scored) == (40, 20, 39)
    assert summary.below == sum(4.0 + index / 10 > 5.0 for index in range(40) if index != 5)
    assert len(summary.points) == 39
    found = {source.name: source for source in summary.sources}
    histogram = found["a"].histogram
    assert histogram is not None
    assert len(histogram.kept) == BINS
    assert (sum(histogram.kept), sum(histogram.ignored)) == (10, 10)
    assert histogram.boundary == pytest.approx((0.0 - 0.2) / 2)
    assert [score.position for score in summary.ends["informative"]][:2] == [39, 38]


def test_a_sample_of_the_rows_sets_the_scale_and_all_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scored(tmp_path)
    monkeypatch.setattr("nvila_pipelines.report.score_summary._SCALE_ROWS", 20)
    monkeypatch.setattr("nvila_pipelines.report.score_summary.MAX_POINTS", 10)
    summary = summarise(out / "scores.parquet", out / "selection.parquet")
    assert [point[0] for point in summary.points] == pytest.approx([4.0 + index / 10 for index in range(0, 40, 4)])
    found = {source.name: source.histogram for source in summary.sources}
    # Only even rows are in the sample, so the second source has its scale from all of its rows.
    for histogram, high, counts in ((found["a"], 1.8, (10, 10)), (found[ATTACK], 1.9, (10, 9))):
        assert histogram is not None
        assert histogram.high == pytest.approx(high)
        assert (sum(histogram.kept), sum(histogram.ignored)) == counts


def test_tables_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    out = scored(tmp_path)
    pq.write_table(pq.read_table(out / "selection.parquet").slice(1), out / "selection.parquet")
    with pytest.raises(ArtifactError, match=r"scores\.parquet has 40 rows, selection\.parquet 39"):
        summarise(out / "scores.parquet", out / "selection.parquet")
