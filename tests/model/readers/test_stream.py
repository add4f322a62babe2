"""Ranges of records, whatever the format: the same as a slice of all of them, in memory that does not grow."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nvila.data.readers.record import Record
from nvila.data.readers.rows import DataFile, Rows

if TYPE_CHECKING:
    from tests.model.readers.conftest import OpenPath, WriteLines

FORMATS = ("json", "jsonl", "parquet", "arrow", "webdataset")
WriteFormat = Callable[[str, int], Path]


def ids(records: list[Record]) -> list[str]:
    return [record.sample.id if record.sample else str(record.problem) for record in records]


@pytest.mark.parametrize("format", FORMATS)
def test_a_range_is_a_slice(format: str, write_format: WriteFormat, open_path: OpenPath) -> None:
    path = write_format(format, 50)
    everything = list(open_path(path).records())
    assert ids(everything) == [f"r{number}" for number in range(50)]
    assert [record.index for record in everything] == list(range(50))
    assert open_path(path).count() == 50
    for start, stop in (
        (0, 0),
        (0, 1),
        (3, 40),
        (16, 17),
        (17, 33),
        (20, 30),
        (34, None),
        (49, 60),
        (50, None),
        (99, 120),
    ):
        part = list(open_path(path).records(start, stop))
        assert [(record.index, record.where, record.sample) for record in part] == [
            (record.index, record.where, record.sample) for record in everything[start:stop]
        ]


@pytest.mark.parametrize("format", FORMATS)
def test_media_belong_to_their_records_also_behind_a_skip(
    format: str, write_format: WriteFormat, open_path: OpenPath
) -> None:
    path = write_format(format, 50)
    if format.startswith("json"):
        for number in range(50):
            (path.parent if path.is_file() else path).joinpath(f"{number}.png").write_bytes(b"%d" % number)
    stream = open_path(path)
    for start in (5, 20, 41, 13):
        for record in stream.records(start, start + 3):
            assert record.sample is not None
            [key] = record.sample.images
            assert record.media[key].read() == b"%d" % record.index


@pytest.mark.parametrize("format", FORMATS)
def test_one_stream_can_be_read_in_any_order_and_twice_at_a_time(
    format: str, write_format: WriteFormat, open_path: OpenPath
) -> None:
    stream = open_path(write_format(format, 50))
    assert ids(list(stream.records(10, 20))) == [f"r{number}" for number in range(10, 20)]
    one, two = stream.records(20, 40), stream.records(0, 20)
    both = [ids([next(one), next(two)]) for _ in range(15)]
    assert both == [[f"r{20 + number}", f"r{number}"] for number in range(15)]
    assert ids(list(stream.records(30, 33))) == ["r30", "r31", "r32"]
    assert ids(list(stream.records(2, 4))) == ["r2", "r3"]
    assert ids(list(stream.records(48))) == ["r48", "r49"]


@pytest.mark.parametrize("format", FORMATS)
def test_reading_on_does_not_start_over(
    format: str, write_format: WriteFormat, open_path: OpenPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open_path(write_format(format, 60))
    opened: list[str] = []
    for kind in {type(part.format) for part in stream._parts}:
        original = kind.open

        def spy(self: object, file: object, fields: object, original: Callable[..., Rows] = original) -> Rows:
            opened.append(str(file))
            return original(self, file, fields)

        monkeypatch.setattr(kind, "open", spy)
    found = []
    for start in range(0, 60, 4):
        for record in stream.records(start, start + 4 if start % 8 else None):
            found.append(record)
            if record.index == start + 3:
                break
    assert ids(found) == [f"r{number}" for number in range(60)]
    assert len(opened) == len(set(opened)) == len(stream._parts)


def test_parquet_files_before_a_range_are_not_opened(
    write_format: WriteFormat, open_path: OpenPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvila.data.readers.parquet import _ParquetRows

    stream = open_path(write_format("parquet", 60))
    groups: list[int] = []
    original = _ParquetRows._next_batch

    def spy(self: _ParquetRows) -> object:
        batch = original(self)
        groups.append(self._group)
        return batch

    monkeypatch.setattr(_ParquetRows, "_next_batch", spy)
    assert ids(list(stream.records(57, 59))) == ["r57", "r58"]
    # The third group of the third file, and nothing else, is decoded.
    assert set(groups) == {3}


def test_what_was_counted_once_is_skipped_afterwards(
    write_format: WriteFormat, open_path: OpenPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvila.data.readers.webdataset import WebDataset

    stream = open_path(write_format("webdataset", 60))
    assert stream.count() == 60
    opened: list[str] = []
    original = WebDataset.open

    def spy(self: WebDataset, file: DataFile, fields: Collection[str]) -> Rows:
        opened.append(file.name)
        return original(self, file, fields)

    monkeypatch.setattr(WebDataset, "open", spy)
    assert ids(list(stream.records(41, 42))) == ["r41"]
    assert opened == ["shard-2.tar"]


def test_a_forked_child_leaves_the_parents_place_alone(write_lines: WriteLines, open_path: OpenPath) -> None:
    path = write_lines([{"id": number, "question": "Q" * 10_000, "answer": "A"} for number in range(50)])
    stream = open_path(path)
    assert ids(list(stream.records(0, 10))) == [str(number) for number in range(10)]
    child = os.fork()
    if child == 0:
        os._exit(0 if ids(list(stream.records(10))) == [str(number) for number in range(10, 50)] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert ids(list(stream.records(10))) == [str(number) for number in range(10, 50)]


@pytest.mark.parametrize("format", FORMATS)
def test_a_stream_can_be_sent_to_another_process(format: str, write_format: WriteFormat, open_path: OpenPath) -> None:
    stream = open_path(write_format(format, 9))
    list(stream.records(0, 2))
    copy = pickle.loads(pickle.dumps(stream))  # noqa: S301 - our own bytes
    assert ids(list(copy.records(2, 5))) == ids(list(stream.records(2, 5))) == ["r2", "r3", "r4"]
