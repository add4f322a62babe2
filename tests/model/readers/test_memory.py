"""Reading ten times as many records takes no more memory."""

from __future__ import annotations

import gc
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nvila.data.readers.record import Record, RecordStream

if TYPE_CHECKING:
    from tests.model.readers.conftest import OpenPath


@pytest.mark.parametrize("count", [200, pytest.param(2_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", ["json", "jsonl", "parquet", "arrow", "webdataset"])
def test_memory_does_not_grow_with_the_data_set(
    format: str, count: int, write_format: Callable[[str, int], Path], open_path: OpenPath
) -> None:
    few, many = open_path(write_format(format, count)), open_path(write_format(format, 10 * count))
    assert most_alive(few) == 1  # and whatever is imported late, is
    small, large = peak(few), peak(many)
    # The interpreter keeps up to 2,000 free tuples of a size; the records that were added have four times as much.
    assert large < small + 1_000_000


def peak(stream: RecordStream) -> int:
    """Bytes that Python objects took at most while all records were read."""
    gc.collect()
    tracemalloc.start()
    try:
        for record in stream.records():
            assert record.problem is None
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def most_alive(stream: RecordStream) -> int:
    """How many records exist while one of the last is read."""
    for record in stream.records(150):
        if record.index >= 190:
            return sum(type(thing) is Record for thing in gc.get_objects())
    return 0


def test_what_a_shard_said_of_its_members_is_not_kept(
    write_format: Callable[[str, int], Path], open_path: OpenPath
) -> None:
    for record in open_path(write_format("webdataset", 300)).records():
        if record.index == 90:
            assert sum(issubclass(type(thing), tarfile.TarInfo) for thing in gc.get_objects()) < 10
