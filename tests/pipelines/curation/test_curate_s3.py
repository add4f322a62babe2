"""`nvila curate s3://...` against a real S3 service on loopback, also when objects go away meanwhile."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest

from nvila.curation.shards import Shards

if TYPE_CHECKING:
    from tests.conftest import S3Service

Curate = Callable[..., int]


@pytest.fixture
def bucket(s3: S3Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give a prefix of this test's own, with the settings that lead to it."""
    for name, value in s3.variables.items():
        monkeypatch.setenv(name, value)
    return f"curate/{tmp_path.name}"


@pytest.fixture
def after_first_shard(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Do something while a run is under way: once its first shard is there."""

    def arrange(event: Callable[[], None]) -> None:
        publish = Shards.publish

        def watched(self: Shards, number: int, *args: Any) -> None:
            publish(self, number, *args)
            if number == 0:
                event()

        monkeypatch.setattr(Shards, "publish", watched)

    return arrange


def upload(s3: S3Service, folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            s3.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())


def scores(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = pq.read_table(out / "scores.parquet").to_pydict()
    return found


def test_data_and_images_in_a_bucket_are_curated_as_those_in_a_folder(
    curate: Curate, models: dict[str, Path], llava: Any, s3: S3Service, bucket: str, tmp_path: Path
) -> None:
    data = llava(12)
    upload(s3, data.parent, bucket)
    words = ["--small", models["small"], "--large", models["large"], "--threads", "1"]
    assert curate(data, *words, "--out", "here") == 0
    assert curate(f"s3://models/{bucket}/llava.jsonl", *words, "--out", "there") == 0
    assert curate(data, *words, "--media-dir", f"s3://models/{bucket}", "--out", "both") == 0
    here = scores(tmp_path / "here")
    assert scores(tmp_path / "there") == here == scores(tmp_path / "both")
    assert set(here["status"]) == {"ok"}
    assert "data:image/png;base64" in (tmp_path / "there" / "report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "there" / "scoring.json").read_text())["data"]["data"].startswith("s3://models/")


def test_an_image_that_goes_away_meanwhile_is_quarantined(
    curate: Curate,
    models: dict[str, Path],
    llava: Any,
    s3: S3Service,
    bucket: str,
    after_first_shard: Any,
    tmp_path: Path,
) -> None:
    upload(s3, llava(60).parent, bucket)
    # Far enough behind what is read ahead.
    gone = f"{bucket}/images/19.png"
    after_first_shard(lambda: s3.client().remove_object(bucket_name="models", object_name=gone))
    words = ["--small", models["small"], "--large", models["large"], "--shard-size", "6", "--max-bad", "5%"]
    assert curate(f"s3://models/{bucket}/llava.jsonl", *words, "--out", "out") == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["id"], line["status"]) for line in lines] == [(f"q{index}", "bad_media") for index in (57, 58, 59)]
    assert lines[0]["reason"].startswith(f"s3://models/{gone}: the object is missing")


def shard(first: int, images: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(first, first + 6):
            image = (images / f"{number}.png").read_bytes()
            text = json.dumps({"question": "what color is the shape?", "answer": "red"}).encode()
            for suffix, data in (("png", image), ("json", text)):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_a_shard_that_goes_away_meanwhile_stops_the_run_which_goes_on_once_it_is_back(
    curate: Curate,
    models: dict[str, Path],
    llava: Any,
    s3: S3Service,
    bucket: str,
    after_first_shard: Any,
    capsys: Any,
    tmp_path: Path,
) -> None:
    images = llava(36).parent / "images"
    for number in range(2):
        s3.put(f"{bucket}/{number}.tar", shard(6 * number, images))
    last = f"{bucket}/1.tar"
    words = [f"s3://models/{bucket}", "--small", models["small"], "--large", models["large"], "--shard-size", "3"]
    assert curate(*words, "--out", "peace") == 0
    after_first_shard(lambda: s3.client().remove_object(bucket_name="models", object_name=last))
    assert curate(*words, "--out", "out") == 1
    assert f"s3://models/{last} does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shards").iterdir()}
    assert len(done) >= 1
    s3.put(last, shard(6, images))
    assert curate(*words, "--out", "out") == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done, "no finished shard is scored again"
    assert scores(tmp_path / "out") == scores(tmp_path / "peace")
