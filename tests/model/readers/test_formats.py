"""Which files a path stands for, and in which format they are."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nvila.errors import CapabilityError, ConfigError, DataError, NvilaError

if TYPE_CHECKING:
    from tests.model.readers.conftest import OpenPath, ReadPath, WriteTar

ROWS = [{"id": f"r{number}", "question": "Q", "answer": "A"} for number in range(3)]
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS).encode()


def ids(records: list[Any]) -> list[str]:
    return [record.sample.id if record.sample else record.problem for record in records]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("d.jsonl", LINES),
        ("d.ndjson", LINES),
        ("d.json", ARRAY),
        ("d.json", LINES),
        ("d.json", b"\xef\xbb\xbf" + ARRAY),
        ("d.json", json.dumps(ROWS, indent=2).encode()),
        ("D.JSONL", LINES),
        ("d.txt", ARRAY),
        ("d.txt", LINES),
        ("d.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("d.json.gz", gzip.compress(ARRAY, mtime=0)),
        ("d.jsonl.bz2", bz2.compress(LINES)),
        ("d.json.xz", lzma.compress(ARRAY)),
        ("d.json", (json.dumps({**ROWS[0], "note": "x" * 5_000}) + "\n").encode() + LINES.partition(b"\n")[2]),
    ],
)
def test_a_json_file_is_recognised(name: str, data: bytes, tmp_path: Path, read_path: ReadPath) -> None:
    (tmp_path / name).write_bytes(data)
    assert ids(read_path(tmp_path / name)) == ["r0", "r1", "r2"]


@pytest.mark.parametrize("format", ["parquet", "arrow", "webdataset"])
def test_a_binary_file_is_recognised_by_what_it_begins_with(
    format: str, write_format: Any, tmp_path: Path, read_path: ReadPath
) -> None:
    import pyarrow as pa

    source = min(write_format(format, 9).iterdir())
    unnamed = tmp_path / "unnamed"
    if format == "arrow":  # a stream has no beginning of its own, a file has
        with pa.ipc.open_stream(source) as reader, pa.ipc.new_file(unnamed, reader.schema) as writer:
            writer.write_table(reader.read_all())
    else:
        unnamed.write_bytes(source.read_bytes())
    assert ids(read_path(unnamed)) == ["r0", "r1", "r2"]


def test_a_format_can_be_named(tmp_path: Path, read_path: ReadPath) -> None:
    (tmp_path / "d.json").write_bytes(LINES)
    assert ids(read_path(tmp_path / "d.json", format="jsonl")) == ["r0", "r1", "r2"]
    assert ids(read_path(f"file://{tmp_path}/d.json")) == ["r0", "r1", "r2"]
    with pytest.raises(DataError, match=r"d\.json is no JSON array"):
        read_path(tmp_path / "d.json", format="json")


@pytest.mark.parametrize(
    ("files", "path", "error", "says"),
    [
        ({}, "nothing", DataError, "nothing does not exist"),
        ({}, "*.jsonl", DataError, r"\*\.jsonl does not exist"),
        ({"readme.md": b"x"}, ".", DataError, "holds no data files .formats: json, jsonl, parquet, arrow, webdataset"),
        ({"a.jsonl": LINES, "b.json": ARRAY}, ".", ConfigError, "holds json and jsonl files"),
        ({"a.bin": b"\0\1"}, "a.bin", ConfigError, r"the format of .*a\.bin is not recognised"),
        ({"a.bin": b""}, "a.bin", ConfigError, "is not recognised"),
        ({"a.json": b'{\n"one": 1}'}, "a.json", DataError, "holds neither an array of records nor one record a line"),
        ({"a.json": b""}, "a.json", DataError, "holds neither an array"),
        ({"a.parquet": b"PAR1nothing"}, "a.parquet", DataError, r"a\.parquet"),
        (
            {"dataset_dict.json": b'{"splits": ["train", "test"]}'},
            ".",
            ConfigError,
            "name one of them: .*/train, .*/test",
        ),
        ({"dataset_dict.json": b"{}"}, ".", DataError, "has no list 'splits'"),
        ({"state.json": b"["}, ".", DataError, "has no list '_data_files'"),
        ({"state.json": b'{"_data_files": 7}'}, ".", DataError, "has no list '_data_files'"),
        ({"state.json": b'{"_data_files": [7]}'}, ".", DataError, "names files that are none"),
        ({"state.json": b'{"_data_files": [{"filename": "../x"}]}'}, ".", DataError, "names files that are none"),
        ({"a.jsonl": LINES}, "", ConfigError, "'' is no location"),
    ],
)
def test_what_cannot_be_told_is_asked(
    files: dict[str, bytes], path: str, error: type[NvilaError], says: str, tmp_path: Path, read_path: ReadPath
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=says):
        read_path(tmp_path / path if path else path)


def test_an_unknown_format_is_named(tmp_path: Path, read_path: ReadPath) -> None:
    with pytest.raises(ConfigError, match=r"'parquett' is not a data format .did you mean 'parquet'"):
        read_path(tmp_path, format="parquett")


def test_splits_of_a_folder_are_not_mixed(tmp_path: Path, read_path: ReadPath) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("a snapshot from a hub")
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "testimony"):
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps({"id": name, "question": "Q", "answer": "A"}))
    with pytest.raises(ConfigError, match=r"holds the splits test and train .*data/test\*, .*data/train\*"):
        read_path(tmp_path)
    assert ids(read_path(tmp_path / "data" / "train*")) == ["train-00000-of-00002", "train-00001-of-00002"]
    for file in (tmp_path / "data").glob("test-*"):
        file.unlink()
    assert ids(read_path(tmp_path)) == ["testimony", "train-00000-of-00002", "train-00001-of-00002"]
    (tmp_path / "Test" / "b").mkdir(parents=True)
    (tmp_path / "Test" / "b" / "x.jsonl").write_bytes(LINES)
    with pytest.raises(ConfigError, match=rf"holds the splits test and train .*{tmp_path}/Test\*, .*/data/train\*"):
        read_path(tmp_path)
    assert ids(read_path(tmp_path / "Test*")) == ["r0", "r1", "r2"]


def test_a_named_format_picks_its_files_of_a_folder(tmp_path: Path, read_path: ReadPath) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.json").write_bytes(ARRAY)
    assert [record.where for record in read_path(tmp_path, format="json")] == [f"b.json:{line}" for line in (1, 2, 3)]
    with pytest.raises(DataError, match="holds no parquet files"):
        read_path(tmp_path, format="parquet")


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_whatever_the_library_cannot_do_is_an_error_of_the_file(
    format: str, write_format: Any, read_path: ReadPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def refuse(*_: object, **__: object) -> None:
        raise pa.ArrowNotImplementedError("not in this build")

    folder = write_format(format, 9)
    monkeypatch.setattr(*((pq, "ParquetFile") if format == "parquet" else (pa.ipc, "open_stream")), refuse)
    with pytest.raises(DataError, match=r"is no (Parquet|Arrow) file: not in this build"):
        read_path(folder)


def test_folders_and_patterns_are_read_in_the_order_of_names(tmp_path: Path, read_path: ReadPath) -> None:
    names = (
        "b/2.jsonl",
        "b/1.jsonl",
        "a.jsonl",
        ".hidden.jsonl",
        "b/_half_written.jsonl",
        ".cache/x.jsonl",
        "c/_y/z.jsonl",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(json.dumps({"id": name, "question": "Q", "answer": "A"}))
    assert ids(read_path(tmp_path)) == ["a.jsonl"]
    assert ids(read_path(tmp_path / "b")) == ["b/1.jsonl", "b/2.jsonl"]
    assert ids(read_path(tmp_path / "**" / "[!_z]*.jsonl")) == ["a.jsonl", "b/1.jsonl", "b/2.jsonl"]
    assert ids(read_path(tmp_path / "b" / "{2..1}.jsonl")) == ["b/2.jsonl", "b/1.jsonl"]
    assert ids(read_path(tmp_path / "{b,c}" / "[1z]*.jsonl")) == ["b/1.jsonl"]
    with pytest.raises(DataError, match=r"b/3\.jsonl does not exist"):
        read_path(tmp_path / "b" / "{1..3}.jsonl")
    (tmp_path / "a.jsonl").rename(tmp_path / "README.md")
    assert [record.where for record in read_path(tmp_path)] == ["1.jsonl:1", "2.jsonl:1"]


def test_names_follow_the_path(tmp_path: Path, open_path: OpenPath) -> None:
    (tmp_path / "charts.v2.jsonl").write_bytes(LINES)
    assert open_path(tmp_path / "charts.v2.jsonl").name == "charts"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "x.jsonl").write_bytes(LINES)
    assert open_path(tmp_path / "docs").name == "docs"
    assert open_path(tmp_path / "docs" / "*.jsonl").name == "docs"


def test_what_save_to_disk_writes_is_read(tmp_path: Path, read_path: ReadPath) -> None:
    import datasets

    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    rows = {"id": ["x", "y", "z"], "image": [{"bytes": b"1", "path": "1.png"}] * 3, "conversations": [turns] * 3}
    features = datasets.Features(
        id=datasets.Value("string"),
        image=datasets.Image(decode=False),
        conversations=[{"from": datasets.Value("string"), "value": datasets.Value("string")}],
    )
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(str(tmp_path / "one"), num_shards=2)
    records = read_path(tmp_path / "one")
    assert ids(records) == ["x", "y", "z"]
    assert [source.read() for record in records for source in record.media.values()] == [b"1"] * 3
    datasets.DatasetDict(train=data).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ConfigError, match="holds several splits"):
        read_path(tmp_path / "splits")
    assert ids(read_path(tmp_path / "splits" / "train")) == ["x", "y", "z"]
    data.to_parquet(str(tmp_path / "hub.parquet"))
    assert ids(read_path(tmp_path / "hub.parquet")) == ["x", "y", "z"]


def test_a_missing_library_names_the_extra(
    tmp_path: Path, read_path: ReadPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    (tmp_path / "d.json").write_bytes(ARRAY)
    monkeypatch.setitem(sys.modules, "ijson", None)
    with pytest.raises(CapabilityError, match=r"needs the package ijson .pip install 'nvila\[curate\]'"):
        read_path(tmp_path / "d.json")


def test_shards_bring_captions_classes_and_several_images(write_tar: WriteTar, read_path: ReadPath) -> None:
    talk = json.dumps(
        {"conversations": [{"from": "human", "value": "<image>or<image>?"}, {"from": "gpt", "value": "A"}]}
    )
    path = write_tar(
        [
            ("__meta__.json", b"{}"),
            ("README", b"no suffix"),
            ("a.jpg", b"1"),
            ("a.txt", b" a cat\n"),
            ("b.cls", b"7"),
            ("b.PNG", b"2"),
            ("dir/c.0.jpg", b"3"),
            ("dir/c.1.jpg", b"4"),
            ("dir/c.json", talk.encode()),
            ("d.mp4", b"5"),
            ("d.json", b'{"id": "own", "video": "d.mp4", "question": "Q", "answer": "A", "caption": "no"}'),
        ]
    )
    records = read_path(path)
    assert [record.problem for record in records] == [None] * 4
    samples = [record.sample for record in records if record.sample]
    assert [sample.id for sample in samples] == ["a", "b", "dir/c", "own"]
    assert [sample.answer for sample in samples] == ["a cat", "7", "A", "A"]
    assert [[source.read() for source in record.media.values()] for record in records] == [
        [b"1"],
        [b"2"],
        [b"3", b"4"],
        [b"5"],
    ]
    assert [record.where for record in records][1:3] == ["shard-000.tar:b", "shard-000.tar:dir/c"]


def test_parquet_columns_of_bytes_and_lists_of_them_are_images(tmp_path: Path, read_path: ReadPath) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    both = {"question": ["Q"], "answer": ["A"], "other": [{"deep": [1]}]}
    pq.write_table(pa.table({"image": pa.array([b"1"], pa.binary()), **both}), tmp_path / "one.parquet")
    pq.write_table(
        pa.table({"images": [[{"bytes": b"1", "path": None}, {"bytes": b"2", "path": "x"}]], **both}),
        tmp_path / "two.parquet",
    )
    pq.write_table(pa.table({"image": ["1.png"], **both}), tmp_path / "path.parquet")
    (tmp_path / "1.png").write_bytes(b"1")
    for name, media in (("one", [b"1"]), ("two", [b"1", b"2"]), ("path", [b"1"])):
        [record] = read_path(tmp_path / f"{name}.parquet")
        assert [source.read() for source in record.media.values()] == media


def test_empty_parts_of_a_table_do_not_end_it(tmp_path: Path, open_path: OpenPath) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(ROWS)
    with (
        pa.ipc.new_stream(tmp_path / "d.arrow", table.schema) as arrow,
        pq.ParquetWriter(tmp_path / "d.parquet", table.schema) as parquet,
    ):
        for part in (table.slice(0, 0), table.slice(0, 1), table.slice(0, 0), table.slice(1)):
            for batch in part.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]:
                arrow.write_batch(batch)
            parquet.write_table(part)
    for name in ("d.arrow", "d.parquet"):
        assert ids(list(open_path(tmp_path / name).records())) == ["r0", "r1", "r2"]
        assert ids(list(open_path(tmp_path / name).records(1))) == ["r1", "r2"]


def test_a_table_without_a_known_column_says_which_it_has(tmp_path: Path, read_path: ReadPath) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["Q"], "reply": ["A"]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"no column that is known, only prompt, reply .rename columns"):
        read_path(tmp_path / "d.parquet")
    [record] = read_path(tmp_path / "d.parquet", rename={"prompt": "question", "reply": "answer"})
    assert record.sample is not None
    assert (record.sample.question, record.sample.answer) == ("Q", "A")
