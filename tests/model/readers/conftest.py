"""Small data sets, written by the tests that read them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from nvila.data.readers.opening import DatasetSpec, open_dataset
from nvila.data.readers.record import Record
from nvila.data.readers.stream import FileStream

Fields = Mapping[str, Any]
OpenPath = Callable[..., FileStream]
ReadPath = Callable[..., list[Record]]
WriteLines = Callable[..., Path]
WriteTar = Callable[..., Path]


@pytest.fixture
def open_path() -> OpenPath:
    """Open a data set by its path."""

    def open_(path: Path | str, **fields: Any) -> FileStream:
        return open_dataset(DatasetSpec(path=str(path), **fields))

    return open_


@pytest.fixture
def read_path(open_path: OpenPath) -> ReadPath:
    """Read all records of a data set."""

    def read(path: Path | str, **fields: Any) -> list[Record]:
        return list(open_path(path, **fields).records())

    return read


@pytest.fixture
def write_lines(tmp_path: Path) -> WriteLines:
    """Write records as JSON lines; a text stands for a raw line."""

    def write(records: Iterable[Fields | str], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write


@pytest.fixture
def write_tar(tmp_path: Path) -> WriteTar:
    """Write members into a tar file."""

    def write(members: Sequence[tuple[str, bytes]], name: str = "shard-000.tar") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


def vqa(number: int) -> dict[str, Any]:
    """A record with a path; its picture need not exist."""
    return {
        "id": f"r{number}",
        "image": f"{number}.png",
        "question": f"What is {number}?",
        "answer": f"It is {number}.",
    }


def tar_members(numbers: Iterable[int]) -> list[tuple[str, bytes]]:
    """The same records as members of a shard."""
    members: list[tuple[str, bytes]] = []
    for number in numbers:
        text = {name: value for name, value in vqa(number).items() if name != "image"}
        members += [(f"{number:06d}.png", b"%d" % number), (f"{number:06d}.json", json.dumps(text).encode())]
    return members


@pytest.fixture
def write_format(tmp_path: Path, write_lines: WriteLines, write_tar: WriteTar) -> Callable[[str, int], Path]:
    """Write the first records in a format, into several files where it usually has several."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table(numbers: Iterable[int]) -> pa.Table:
        rows = [vqa(number) | {"image": {"bytes": b"%d" % number, "path": None}} for number in numbers]
        return pa.Table.from_pylist(rows)

    def write(format: str, count: int) -> Path:
        third = count // 3
        ranges = [range(third), range(third, 2 * third), range(2 * third, count)]
        if format == "jsonl":
            return write_lines(map(vqa, range(count)), f"{count}.jsonl")
        folder = tmp_path / f"{format}-{count}"
        folder.mkdir()
        if format == "json":
            (folder / "data.json").write_text(json.dumps([vqa(number) for number in range(count)]))
        for number, numbers in enumerate(ranges):
            if format == "parquet":
                pq.write_table(table(numbers), folder / f"part-{number}.parquet", row_group_size=7)
            elif format == "webdataset":
                write_tar(tar_members(numbers), f"{folder.name}/shard-{number}.tar")
            elif format == "arrow":
                with pa.ipc.new_stream(folder / f"data-{number}.arrow", table([0]).schema) as writer:
                    writer.write_table(table(numbers), max_chunksize=11)
        return folder

    return write
