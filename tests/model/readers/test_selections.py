"""A data set cut down to what a saved selection keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nvila.data.mixtures import Registry
from nvila.errors import ConfigError, DataError, NvilaError

if TYPE_CHECKING:
    from tests.model.readers.conftest import WriteLines, WriteTar


def write_selection(path: Path, rows: list[tuple[str, str, bool]], **columns: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    ids, sources, kept = zip(*rows, strict=True)
    pq.write_table(pa.table({"id": list(ids), "source": list(sources), "kept": list(kept), **columns}), path)


def read(expression: str, start: int = 0, stop: int | None = None) -> list[str]:
    stream = Registry().open(expression)
    records = list(stream.records(start, stop))
    assert [record.index for record in records] == list(range(start, start + len(records)))
    return [record.sample.id if record.sample else "-" for record in records]


@pytest.fixture
def data(write_lines: WriteLines) -> Path:
    """Ten records, of which the third is broken."""
    rows: list[Any] = [{"id": number, "question": "Q", "answer": "A"} for number in range(10)]
    return write_lines([*rows[:2], "{", *rows[3:]])


def test_a_table_keeps_by_id_and_source(data: Path, tmp_path: Path) -> None:
    rows = [(str(number), "data", number % 2 == 0) for number in range(10)]
    write_selection(tmp_path / "half" / "selection.parquet", [*rows, ("1", "elsewhere", True)], delta=[0.0] * 11)
    for place in ("half", "half/selection.parquet"):
        expression = f"{data}@{tmp_path}/{place}"
        assert read(expression) == ["0", "4", "6", "8"]
        assert read(expression, 1, 3) == ["4", "6"]
        assert read(expression, 3) == ["8"]
        assert read(expression, 4) == []
        assert Registry().open(expression).count() == 4


def test_a_duplicate_that_was_left_out_stays_out(write_lines: WriteLines, tmp_path: Path) -> None:
    ids = ["a", "b", "a", "c", "a", "c"]
    data = write_lines({"id": id, "question": f"Q{number}", "answer": "A"} for number, id in enumerate(ids))
    kept = [True, False, False, True, False, True]
    write_selection(tmp_path / "s.parquet", [(id, "data", keep) for id, keep in zip(ids, kept, strict=True)])
    records = Registry().open(f"{data}@{tmp_path}/s.parquet").records()
    assert [record.sample.question for record in records if record.sample is not None] == ["Q0", "Q3", "Q5"]


def test_a_list_leaves_out_by_position(data: Path, tmp_path: Path) -> None:
    (tmp_path / "0.5").mkdir()
    (tmp_path / "0.5" / "data.json").write_text("[0, 9, 4, 4]")
    (tmp_path / "other.json").write_text("[]")
    assert read(f"{data}@{tmp_path}/0.5") == ["1", "-", "3", "5", "6", "7", "8"]
    assert read(f"{data}@{tmp_path}/0.5/data.json", 2, 4) == ["3", "5"]
    assert len(read(f"{data}@{tmp_path}/other.json")) == 10


def test_records_that_a_damaged_shard_lacks_are_not_mistaken_for_others(write_tar: WriteTar, tmp_path: Path) -> None:
    members = [(f"{number}.{suffix}", b"x") for number in range(4) for suffix in ("png", "txt")]
    cut = write_tar(members, "set/a.tar")
    cut.write_bytes(cut.read_bytes()[: 5 * 512])
    write_tar(members, "set/b.tar")
    (tmp_path / "set" / "sizes.json").write_text('{"a.tar": 4, "b.tar": 4}')
    (tmp_path / "list.json").write_text("[0, 5]")
    records = list(Registry().open(f"{tmp_path}/set@{tmp_path}/list.json").records())
    assert [(record.index, record.where) for record in records] == [
        (0, "a.tar:end"), (3, "b.tar:0"), (4, "b.tar:2"), (5, "b.tar:3"),
    ]  # fmt: skip


def test_selections_of_large_data_sets_are_looked_up_in_blocks(write_lines: WriteLines, tmp_path: Path) -> None:
    count = 9_000
    data = write_lines({"id": number, "question": "Q", "answer": "A"} for number in range(count))
    write_selection(tmp_path / "s.parquet", [(str(number), "data", number % 3 == 0) for number in range(count)])
    assert read(f"{data}@{tmp_path}/s.parquet") == [str(number) for number in range(0, count, 3)]


def test_a_part_that_is_repeated_is_selected_once_each_time(data: Path, tmp_path: Path) -> None:
    (tmp_path / "most.json").write_text(json.dumps(list(range(8))))
    assert read(f"{data}*2@{tmp_path}/most.json + {data}") == ["8", "9", "8", "9", "0", "1", "-", *"3456789"]


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        ("[10]", ConfigError, "leaves out record 10, 'data' has 10"),
        ("[-1]", ConfigError, "leaves out record -1"),
        ("[0.5]", ConfigError, "is no list of indices"),
        ("[true]", ConfigError, "is no list of indices"),
        ("{}", ConfigError, "is no list of indices"),
        ("[", ConfigError, "is broken JSON"),
        (json.dumps(list(range(10))), ConfigError, "leaves out all of 'data'"),
    ],
)
def test_a_list_of_another_data_set_is_refused(
    content: str, error: type[NvilaError], says: str, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(error, match=says):
        read(f"{data}@{tmp_path}/list.json")


def test_a_table_that_keeps_nothing_of_the_data_says_what_it_keeps(data: Path, tmp_path: Path) -> None:
    write_selection(tmp_path / "s.parquet", [("7", "train", True), ("0", "data", False)])
    says = "keeps none of the records of 'data' .it keeps '7' of source 'train'; the data set has '0' of source 'data'"
    with pytest.raises(ConfigError, match=says):
        read(f"{data}@{tmp_path}/s.parquet")
    write_selection(tmp_path / "s.parquet", [("7", "data", False)])
    with pytest.raises(ConfigError, match="it keeps nothing"):
        read(f"{data}@{tmp_path}/s.parquet")


def test_a_table_that_is_none_is_refused(data: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": ["1"]}), tmp_path / "s.parquet")
    with pytest.raises(ConfigError, match="has no column source, kept"):
        read(f"{data}@{tmp_path}/s.parquet")
    (tmp_path / "s.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"s\.parquet cannot be read"):
        read(f"{data}@{tmp_path}/s.parquet")
