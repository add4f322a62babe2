"""Data sets and media on a real S3 service on loopback."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nvila.data.mixtures import Registry
from nvila.data.readers.opening import DatasetSpec, open_dataset
from nvila.data.readers.record import Record
from nvila.data.readers.stream import FileStream
from nvila.errors import CapabilityError, ConfigError, DataError, InfrastructureError, NvilaError
from nvila_platform.s3_filesystem import S3FileSystem, data_filesystems
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from tests.conftest import S3Service

Open = Callable[..., FileStream]


def record(number: int, size: int = 0) -> dict[str, Any]:
    answer = f"a {number}" + "x" * size
    return {"id": str(number), "image": f"img/{number}.png", "question": "Q", "answer": answer}


def jsonl(count: int, size: int = 0) -> bytes:
    return b"".join(json.dumps(record(number, size)).encode() + b"\n" for number in range(count))


def parquet(count: int, size: int = 0, group: int = 10) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    rows = [record(number, size) | {"image": {"bytes": b"%d" % number, "path": None}} for number in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=group, compression="none", use_dictionary=False)
    return buffer.getvalue()


def tar(count: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(count):
            for suffix, data in (("png", b"%d" % number), ("txt", b"a %d" % number)):
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def open_on(s3: S3Service, path: str, **fields: Any) -> FileStream:
    filesystems = data_filesystems(Settings.load(Path(), s3.variables))
    return open_dataset(DatasetSpec(path=path, **fields), filesystems=filesystems)


def answers(records: Iterator[Record]) -> list[str]:
    return [record.sample.answer if record.sample else str(record.problem) for record in records]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A prefix of this test's own."""
    return f"models/{tmp_path.name}"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("data.jsonl", jsonl(30)),
        ("data.json", json.dumps([record(number) for number in range(30)]).encode()),
        ("data.parquet", parquet(30)),
        ("data.tar", tar(30)),
    ],
    ids=["jsonl", "json", "parquet", "webdataset"],
)
def test_every_format_is_read_by_folder_pattern_and_name(name: str, data: bytes, s3: S3Service, folder: str) -> None:
    s3.put(f"{folder.partition('/')[2]}/set/{name}", data)
    for number in range(30):
        s3.put(f"{folder.partition('/')[2]}/set/img/{number}.png", b"%d" % number)
    for path in (f"s3://{folder}/set", f"s3://{folder}/set/", f"s3://{folder}/s*/data.*", f"s3://{folder}/set/{name}"):
        stream = open_on(s3, path)
        found = list(stream.records(4, 20))
        assert answers(iter(found)) == [f"a {number}" for number in range(4, 20)]
        assert [next(iter(one.media.values())).read() for one in found] == [b"%d" % number for number in range(4, 20)]
        assert stream.count() == 30


def test_shards_in_subfolders_are_found(s3: S3Service, folder: str) -> None:
    for number in range(3):
        s3.put(f"{folder.partition('/')[2]}/train/{number}/part.jsonl", jsonl(number + 1))
    stream = open_on(s3, f"s3://{folder}/train")
    assert answers(stream.records()) == ["a 0", "a 0", "a 1", "a 0", "a 1", "a 2"]
    assert [one.where for one in stream.records(0, 2)] == ["0/part.jsonl:1", "1/part.jsonl:1"]


def test_records_and_media_may_lie_in_different_places(s3: S3Service, folder: str, tmp_path: Path) -> None:
    s3.put(f"{folder.partition('/')[2]}/pictures/img/0.png", b"far")
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "0.png").write_bytes(b"near")
    (tmp_path / "data.jsonl").write_bytes(jsonl(1))
    s3.put(f"{folder.partition('/')[2]}/data.jsonl", jsonl(1))
    [here] = open_on(s3, str(tmp_path / "data.jsonl"), media_dir=f"s3://{folder}/pictures").records()
    [there] = open_on(s3, f"s3://{folder}/data.jsonl", media_dir=str(tmp_path)).records()
    assert {key: source.read() for key, source in here.media.items()} == {f"s3://{folder}/pictures/img/0.png": b"far"}
    assert {key: source.read() for key, source in there.media.items()} == {f"{tmp_path}/img/0.png": b"near"}


def test_a_registry_on_s3_speaks_of_what_lies_beside_it(s3: S3Service, folder: str) -> None:
    prefix = folder.partition("/")[2]
    s3.put(f"{prefix}/sets/a.jsonl", jsonl(5))
    s3.put(f"{prefix}/half/a.json", b"[0, 1]")
    s3.put(f"{prefix}/mixtures.yaml", b"a: {path: sets/a.jsonl}\nb: a@half + a\n")
    registry = Registry.load(f"s3://{folder}/mixtures.yaml", data_filesystems(Settings.load(Path(), s3.variables)))
    assert answers(registry.open("b").records()) == ["a 2", "a 3", "a 4", "a 0", "a 1", "a 2", "a 3", "a 4"]
    assert registry.open(f"s3://{folder}/sets/*.jsonl*2").count() == 10


@pytest.mark.parametrize("path", ["../other/1.png", "/etc/passwd", "s3://models/other/1.png", "http://x/1.png"])
def test_media_stay_below_their_folder(path: str, s3: S3Service, folder: str) -> None:
    s3.put(f"{folder.partition('/')[2]}/set/d.jsonl", json.dumps(record(0) | {"image": path}).encode())
    [found] = open_on(s3, f"s3://{folder}/set/d.jsonl").records()
    assert (found.problem or "").startswith(f"media path '{path}' ")


def test_an_address_below_the_folder_is_a_path_as_well(s3: S3Service, folder: str) -> None:
    prefix = folder.partition("/")[2]
    s3.put(f"{prefix}/set/1.png", b"one")
    s3.put(f"{prefix}/set/d.jsonl", json.dumps(record(0) | {"image": f"s3://{folder}/set/1.png"}).encode())
    [found] = open_on(s3, f"s3://{folder}/set/d.jsonl").records()
    assert [source.read() for source in found.media.values()] == [b"one"]


def test_only_the_row_groups_of_a_range_are_fetched(
    s3: S3Service, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = parquet(400, size=100_000, group=20)
    assert len(data) > 40_000_000
    s3.put(f"{folder.partition('/')[2]}/big.parquet", data)
    fetched: list[int] = []
    original = S3FileSystem._get

    def spy(self: S3FileSystem, *args: Any) -> bytes:
        found = original(self, *args)
        fetched.append(len(found))
        return found

    monkeypatch.setattr(S3FileSystem, "_get", spy)
    stream = open_on(s3, f"s3://{folder}/big.parquet")
    assert [one.index for one in stream.records(380, 385)] == list(range(380, 385))
    assert sum(fetched) < len(data) / 2


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_an_object_that_goes_away_meanwhile_is_named(name: str, s3: S3Service, folder: str) -> None:
    key = f"{folder.partition('/')[2]}/{name}"
    s3.put(key, jsonl(200, 100_000) if name.endswith("l") else parquet(200, 100_000))
    records = open_on(s3, f"s3://{folder}/{name}").records()
    next(records)
    s3.client().remove_object(bucket_name="models", object_name=key)
    with pytest.raises(DataError, match=rf"{name}: the object is missing"):
        list(records)


def test_an_object_that_is_replaced_meanwhile_is_not_mixed_up(s3: S3Service, folder: str) -> None:
    key = f"{folder.partition('/')[2]}/data.jsonl"
    s3.put(key, jsonl(200, 100_000))
    records = open_on(s3, f"s3://{folder}/data.jsonl").records()
    next(records)
    s3.put(key, jsonl(200, 100_001))
    with pytest.raises(DataError, match=r"data\.jsonl: the object changed while it was read"):
        list(records)


def test_a_missing_image_is_found_by_who_reads_it(s3: S3Service, folder: str) -> None:
    s3.put(f"{folder.partition('/')[2]}/d.jsonl", jsonl(1))
    [found] = open_on(s3, f"s3://{folder}/d.jsonl").records()
    assert found.problem is None
    [source] = found.media.values()
    with pytest.raises(DataError, match=rf"s3://{folder}/img/0\.png: the object is missing"):
        source.read()


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_a_service_that_dies_is_worth_another_try(name: str, mortal_s3: S3Service) -> None:
    mortal_s3.put(name, jsonl(200, 100_000) if name.endswith("l") else parquet(200, 100_000))
    stream = open_on(mortal_s3, f"s3://models/{name}")
    records = stream.records()
    first = next(records)
    mortal_s3.kill()
    with pytest.raises(InfrastructureError, match="cannot be reached") as caught:
        list(records)
    assert caught.value.retryable
    if name.endswith("l"):
        with pytest.raises(InfrastructureError, match=r"img/0\.png: the S3 service cannot be reached"):
            next(iter(first.media.values())).read()
    with pytest.raises(InfrastructureError, match="cannot be reached"):
        open_on(mortal_s3, f"s3://models/{name}")
    for asked in ("exists", "isfile", "isdir"):
        with pytest.raises(InfrastructureError, match="cannot be reached"):
            getattr(S3FileSystem(Settings.load(Path(), mortal_s3.variables)), asked)(f"models/{name}")


@pytest.mark.parametrize(
    ("path", "changes", "error", "says"),
    [
        ("s3://models/nothing", {}, DataError, "s3://models/nothing does not exist"),
        ("s3://models/nothing/*.tar", {}, DataError, "does not exist"),
        ("s3://no-such-bucket/x", {}, ConfigError, "no such bucket"),
        ("s3://models/probe", {"NVILA_S3_SECRET_KEY": "wrong"}, ConfigError, "check NVILA_S3_ACCESS_KEY"),
        ("s3://models/probe", {"NVILA_S3_ENDPOINT": ""}, ConfigError, "NVILA_S3_ENDPOINT is not set, data on s3://"),
        ("gs://models/probe", {}, ConfigError, "no file system for gs://"),
    ],
)
def test_what_is_not_there_or_not_allowed(
    path: str, changes: dict[str, str], error: type[NvilaError], says: str, s3: S3Service
) -> None:
    filesystems = data_filesystems(Settings.load(Path(), s3.variables | changes))
    with pytest.raises(error, match=says) as caught:
        open_dataset(DatasetSpec(path=path), filesystems=filesystems)
    assert "only-for-this-test" not in str(caught.value)


def test_the_file_system_keeps_the_common_interface(s3: S3Service, folder: str) -> None:
    prefix = folder.partition("/")[2]
    s3.put(f"{prefix}/a/one.txt", b"0123456789")
    s3.put(f"{prefix}/a/b/two.txt", b"")
    fs = pickle.loads(pickle.dumps(S3FileSystem(Settings.load(Path(), s3.variables))))  # noqa: S301 - our own bytes
    assert fs.ls(f"s3://{folder}/a", detail=False) == [f"{folder}/a/b", f"{folder}/a/one.txt"]
    assert fs.ls(f"{folder}/a/one.txt", detail=False) == [f"{folder}/a/one.txt"]
    assert fs.find(f"{folder}/a") == [f"{folder}/a/b/two.txt", f"{folder}/a/one.txt"]
    assert fs.find(f"{folder}/a", maxdepth=1) == [f"{folder}/a/one.txt"]
    assert fs.glob(f"{folder}/a/*.txt") == [f"{folder}/a/one.txt"]
    assert (fs.isdir(f"{folder}/a"), fs.isfile(f"{folder}/a"), fs.exists(f"{folder}/c")) == (True, False, False)
    assert fs.isdir("models")
    s3.put(f"{prefix}/marked/", b"")
    s3.put(f"{prefix}/marked/x.txt", b"x")
    assert fs.ls(f"{folder}/marked", detail=False) == fs.find(f"{folder}/marked") == [f"{folder}/marked/x.txt"]
    assert fs.cat_file(f"{folder}/a/one.txt", 5, 5) == b""
    assert fs.info(f"{folder}/a/one.txt")["size"] == 10
    assert fs.cat_file(f"{folder}/a/one.txt", 2, 5) == b"234"
    assert fs.cat_file(f"{folder}/a/one.txt", -3) == b"789"
    assert fs.cat_file(f"{folder}/a/b/two.txt") == b""
    with fs.open(f"{folder}/a/one.txt", "rb", block_size=4) as file:
        file.seek(7)
        assert file.read() == b"789"
    with pytest.raises(CapabilityError, match="data on S3 is only read"):
        fs.open(f"{folder}/a/new.txt", "wb")
