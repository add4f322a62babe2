"""Media are found where they may be, and are not read before somebody asks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nvila.data.dataset import IMAGES_FILE
from nvila.data.media import write_image_table
from nvila.data.records import vqa_sample, write_jsonl
from nvila.errors import DataError

if TYPE_CHECKING:
    from tests.model.readers.conftest import ReadPath, WriteLines


def vqa(image: Any) -> dict[str, Any]:
    return {"image": image, "question": "Q", "answer": "A"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files `set/1.png`, `set/sub/2.png` and `media/3.png`."""
    for name in ("set/1.png", "set/sub/2.png", "media/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


@pytest.mark.parametrize(
    ("path", "media_dir", "file"),
    [
        ("1.png", None, "set/1.png"),
        ("sub/2.png", None, "set/sub/2.png"),
        ("sub/../1.png", None, "set/1.png"),
        ("{tree}/set/1.png", None, "set/1.png"),
        ("file://{tree}/set/1.png", None, "set/1.png"),
        ("3.png", "media", "media/3.png"),
        ("{tree}/media/3.png", "media", "media/3.png"),
        ("../media/3.png", "media", "media/3.png"),
        ("media/3.png", ".", "media/3.png"),
        ("3.png", "/", None),
    ],
)
def test_a_path_starts_at_the_data_file_or_at_media_dir(
    path: str, media_dir: str | None, file: str | None, tree: Path, write_lines: WriteLines, read_path: ReadPath
) -> None:
    data = write_lines([vqa(path.format(tree=tree))], "set/data.jsonl")
    folder = None if media_dir is None else os.path.join(tree, media_dir)
    [record] = read_path(data, media_dir=folder)
    [(key, source)] = record.media.items()
    assert record.sample is not None
    assert record.sample.images == (key,)
    assert key == (f"{tree}/{file}" if file else "/3.png")
    if file:
        assert source.read() == file.encode()


@pytest.mark.parametrize(
    ("path", "media_dir", "says"),
    [
        ("../media/3.png", None, "leads out of"),
        ("sub/../../media/3.png", None, "leads out of"),
        ("/etc/passwd", None, "leads out of"),
        ("file:///etc/passwd", None, "leads out of"),
        ("..", None, "leads out of"),
        (".", None, "leads out of"),
        ("../set-2/1.png", "set", "leads out of"),
        ("{tree}/set/1.png", "media", "leads out of"),
        ("http://example.org/1.png", None, "is not below"),
        ("s3://bucket/1.png", None, "is not below"),
        ("1\0.png", None, "holds a null character"),
    ],
)
def test_a_path_that_leads_out_is_a_problem_of_its_record(
    path: str, media_dir: str | None, says: str, tree: Path, write_lines: WriteLines, read_path: ReadPath
) -> None:
    data = write_lines([vqa(path.format(tree=tree))], "set/data.jsonl")
    [record] = read_path(data, media_dir=None if media_dir is None else str(tree / media_dir))
    assert says in (record.problem or "")


def test_a_missing_image_is_found_by_who_reads_it(write_lines: WriteLines, read_path: ReadPath) -> None:
    data = write_lines([vqa("gone.png"), vqa("folder")])
    (data.parent / "folder").mkdir()
    gone, folder = read_path(data)
    assert (gone.problem, folder.problem) == (None, None)
    with pytest.raises(DataError, match=rf"{data.parent}/gone\.png does not exist"):
        next(iter(gone.media.values())).read()
    with pytest.raises(DataError, match=rf"{data.parent}/folder is a folder"):
        next(iter(folder.media.values())).read()


def test_an_image_that_may_not_be_read_says_so(
    write_lines: WriteLines, read_path: ReadPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    [record] = read_path(write_lines([vqa("1.png")]))
    monkeypatch.setattr(LocalFileSystem, "cat_file", refuse)
    with pytest.raises(DataError, match=r"1\.png may not be read"):
        next(iter(record.media.values())).read()


def test_equal_keys_are_equal_media_also_between_data_sets(
    tree: Path, write_lines: WriteLines, read_path: ReadPath
) -> None:
    one = write_lines([vqa("1.png"), vqa("./1.png")], "set/data.jsonl")
    other = write_lines([vqa("1.png")], "media/data.jsonl")
    keys = [next(iter(record.media)) for record in (*read_path(one), *read_path(other))]
    assert keys == [f"{tree}/set/1.png", f"{tree}/set/1.png", f"{tree}/media/1.png"]


def test_samples_of_a_data_directory_take_their_images_from_its_table(tmp_path: Path, read_path: ReadPath) -> None:
    samples = [
        vqa_sample(id=f"s{number}", source="kind", image=f"train/{number}", question="Q", answer="A")
        for number in (1, 2)
    ]
    write_jsonl(tmp_path / "train.jsonl", samples)
    write_image_table(tmp_path / IMAGES_FILE, [("train/1", b"one")])
    first, second = read_path(tmp_path)
    assert first.sample is not None
    assert (first.sample.id, first.sample.source, first.sample.question) == ("s1", "kind", "Q")
    assert [source.read() for source in first.media.values()] == [b"one"]
    with pytest.raises(DataError, match=r"image 'train/2' is not in .*images\.parquet"):
        next(iter(second.media.values())).read()


def test_a_parquet_file_of_that_name_with_other_columns_is_no_image_table(tmp_path: Path, read_path: ReadPath) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_jsonl(tmp_path / "train.jsonl", [vqa_sample(id="s", source="k", image="1.png", question="Q", answer="A")])
    pq.write_table(pa.table({"x": [1]}), tmp_path / IMAGES_FILE)
    [record] = read_path(tmp_path / "train.jsonl")
    assert list(record.media) == [f"{tmp_path}/1.png"]
    (tmp_path / IMAGES_FILE).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"images\.parquet is no Parquet file"):
        read_path(tmp_path / "train.jsonl")
