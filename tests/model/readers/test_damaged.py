"""Files that break off: what came before stays usable, the rest is one record that says so."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nvila.data.readers import json_lines
from nvila.errors import DataError

if TYPE_CHECKING:
    from tests.model.readers.conftest import OpenPath, ReadPath, WriteTar

ROWS = [{"id": f"r{number}", "question": "Q", "answer": f"A{'x' * 40}"} for number in range(6)]


def outcome(records: list[Any]) -> list[str]:
    assert [record.index for record in records] == sorted(record.index for record in records)
    return [record.sample.id if record.sample else str(record.problem) for record in records]


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        (json.dumps(ROWS)[:-1], 6),
        (json.dumps(ROWS)[:-30], 5),
        (json.dumps(ROWS[:3])[:-1] + ", {]", 3),
        (json.dumps(ROWS[:3]) + "]", 3),
        (json.dumps(ROWS[:2])[:-1] + ', {"a": "\\x"}]', 2),
        (json.dumps(ROWS[:2])[:-1] + ', {"a": ' + "1" * 5_000 + "}]", 2),
    ],
    ids=["no-end", "in-a-record", "broken-record", "more-than-the-array", "bad-escape", "long-number"],
)
def test_a_broken_array_keeps_what_came_before(text: str, usable: int, tmp_path: Path, open_path: OpenPath) -> None:
    (tmp_path / "d.json").write_text(text)
    *good, last = outcome(list(open_path(tmp_path / "d.json").records()))
    assert good == [f"r{number}" for number in range(usable)]
    assert last.startswith("the array breaks off here: ")
    assert open_path(tmp_path / "d.json").count() == usable + 1
    assert outcome(list(open_path(tmp_path / "d.json").records(usable))) == [last]
    assert outcome(list(open_path(tmp_path / "d.json").records(usable + 1))) == []


def test_nesting_without_end_does_not_fill_the_memory(tmp_path: Path, read_path: ReadPath) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "d.json").write_text(f'[{json.dumps(ROWS[0])}, {{"a": {deep}}}, {json.dumps(ROWS[1])}]')
    assert outcome(read_path(tmp_path / "d.json")) == ["r0", "the array breaks off here: more than 100 levels"]


def test_records_of_an_array_that_are_none_do_not_end_it(tmp_path: Path, read_path: ReadPath) -> None:
    (tmp_path / "d.json").write_text(json.dumps([1, ROWS[0], None, [], ROWS[1]]))
    none = "a record must be an object, this is "
    assert outcome(read_path(tmp_path / "d.json")) == [f"{none}a number", "r0", f"{none}null", f"{none}an array", "r1"]


def test_bytes_that_are_no_utf8_are_a_problem_of_their_line_and_end_an_array(
    tmp_path: Path, read_path: ReadPath
) -> None:
    lines = [json.dumps(row).encode() for row in ROWS[:3]]
    lines[1] = lines[1].replace(b"xx", b"\xff\xff", 1)
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    first, second, third = outcome(read_path(tmp_path / "d.jsonl"))
    assert (first, third) == ("r0", "r2")
    assert second.startswith("broken JSON: 'utf-8' codec can't decode")
    (tmp_path / "d.json").write_bytes(b"[" + b",".join(lines) + b"]")
    first, second = outcome(read_path(tmp_path / "d.json"))
    assert (first, second[:27]) == ("r0", "the array breaks off here: ")


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.json.gz"])
def test_a_compressed_file_that_is_cut_short(name: str, tmp_path: Path, open_path: OpenPath) -> None:
    rows = [{"id": f"r{number}", "question": "Q", "answer": f"A{hash(str(number))}"} for number in range(4_000)]
    text = json.dumps(rows) if name == "d.json.gz" else "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / name).write_bytes(gzip.compress(text.encode())[:-2_000])
    *good, last = outcome(list(open_path(tmp_path / name).records()))
    assert len(good) > 1_000
    assert good == [f"r{number}" for number in range(len(good))]
    assert "here" in last
    assert open_path(tmp_path / name).count() == len(good) + 1


def test_a_line_without_end_does_not_fill_the_memory(
    tmp_path: Path, read_path: ReadPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "LONGEST_LINE", 100)
    good = json.dumps({"id": "g", "question": "Q", "answer": "A"})
    (tmp_path / "d.jsonl").write_text(f"{good}\n{'x' * 450}\n{good}\n{'x' * 450}")
    long = "the line has more than 100 bytes"
    assert outcome(read_path(tmp_path / "d.jsonl")) == ["g", long, "g", long]


def test_a_file_that_cannot_be_opened_any_more_ends_the_reading(tmp_path: Path, open_path: OpenPath) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps(ROWS[0]))
    records = open_path(tmp_path).records()
    next(records)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"b\.jsonl does not exist"):
        list(records)


def write_table(path: Path, format: str) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"id": f"r{number:03}", "question": "Q", "answer": f"A{number}" * 200} for number in range(100)]
    table = pa.Table.from_pylist(rows)
    if format == "parquet":
        pq.write_table(table, path, row_group_size=20, compression="zstd")
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=20)
    return path.read_bytes()


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_a_damaged_table_loses_what_cannot_be_read_and_says_so(
    format: str, tmp_path: Path, open_path: OpenPath
) -> None:
    import pyarrow.parquet as pq

    (tmp_path / "set").mkdir()
    data = bytearray(write_table(tmp_path / "set" / f"a.{format}", format))
    write_table(tmp_path / "set" / f"b.{format}", format)
    if format == "parquet":
        chunk = pq.read_metadata(tmp_path / "set" / "a.parquet").row_group(3).column(2)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        data[start + 20 : start + chunk.total_compressed_size] = b"\0" * (chunk.total_compressed_size - 20)
    else:
        data = data[: len(data) * 7 // 10]
    (tmp_path / "set" / f"a.{format}").write_bytes(data)
    records = list(open_path(tmp_path / "set").records())
    assert [record.index for record in records] == list(range(len(records)))
    found = outcome(records)
    whole = [f"r{number:03}" for number in range(100)]
    # A Parquet file loses a row group, of an Arrow file the rest is one record.
    lost, after = (20, whole[80:]) if format == "parquet" else (1, [])
    assert found[:60] == whole[:60]
    assert all(problem.startswith("the table is damaged here: ") for problem in found[60 : 60 + lost])
    assert found[60 + lost :] == after + whole
    assert open_path(tmp_path / "set").count() == len(records)
    for start in (50, 60, 61, 70, 80, 85, 100, 101, 130):
        part = list(open_path(tmp_path / "set").records(start))
        assert [(one.index, one.where, one.problem) for one in part] == [
            (one.index, one.where, one.problem) for one in records[start:]
        ]


def test_offsets_of_an_arrow_file_that_lead_elsewhere_cost_their_batch(tmp_path: Path, open_path: OpenPath) -> None:
    import pyarrow as pa

    rows = [{"id": f"r{number}", "question": "Q", "answer": "A" * 100} for number in range(30)]
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(tmp_path / "d.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    data = (tmp_path / "d.arrow").read_bytes()
    at = data.index(struct.pack("<3i", 0, 100, 200), data.index(struct.pack("<3i", 0, 100, 200)) + 1)
    (tmp_path / "d.arrow").write_bytes(data[:at] + struct.pack("<3i", 0, 2**31 - 1, -5) + data[at + 12 :])
    found = outcome(list(open_path(tmp_path / "d.arrow").records()))
    assert found[:10] + found[20:] == [f"r{number}" for number in (*range(10), *range(20, 30))]
    assert all(problem.startswith("the table is damaged here: ") for problem in found[10:20])
    assert outcome(list(open_path(tmp_path / "d.arrow").records(15))) == found[15:]


def test_lengths_in_an_arrow_file_take_no_memory_before_they_are_found_wrong(
    tmp_path: Path, read_path: ReadPath
) -> None:
    data = bytearray(write_table(tmp_path / "d.arrow", "arrow"))
    second = data.index(b"\xff\xff\xff\xff", 8)  # begins a message; its length follows
    data[second + 4 : second + 8] = struct.pack("<i", 2**31 - 1)
    (tmp_path / "d.arrow").write_bytes(data)
    tracemalloc.start()
    try:
        [problem] = outcome(read_path(tmp_path / "d.arrow"))
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    assert problem.startswith("the table is damaged here: ")


def test_text_of_a_table_that_is_no_utf8_is_a_problem_of_its_row(tmp_path: Path, read_path: ReadPath) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    answers = pa.array([b"A", b"\xff", b"B"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": ["x", "y", "z"], "question": ["Q"] * 3, "answer": answers}), tmp_path / "d.parquet")
    first, second, third = outcome(read_path(tmp_path / "d.parquet"))
    assert (first, third) == ("x", "z")
    assert second.startswith("a text is no UTF-8: ")


@pytest.mark.parametrize("data", [b"", b"nothing of the kind" * 100], ids=["empty", "other"])
def test_a_file_that_is_no_arrow_file(data: bytes, tmp_path: Path, read_path: ReadPath) -> None:
    (tmp_path / "d.arrow").write_bytes(data)
    with pytest.raises(DataError, match=r"d\.arrow"):
        read_path(tmp_path / "d.arrow")


MEMBERS = [
    (f"{number:03}.{suffix}", data * 300) for number in range(5) for suffix, data in (("png", b"p"), ("txt", b"a"))
]
BLOCK = 512


def cut_tar(path: Path, blocks: float) -> Path:
    """Each member of `MEMBERS` takes a block for its header and one for its bytes."""
    path.write_bytes(path.read_bytes()[: int(blocks * BLOCK)])
    return path


@pytest.mark.parametrize(
    ("blocks", "usable"),
    [
        (20, 5),  # exactly behind the last member: only the end mark is missing
        (19.3, 4),  # in the last member's bytes
        (18, 4),  # behind the header of the last member
        (17.5, 4),  # in the bytes of the last picture
        (12.5, 3),  # in the header of the fourth picture
        (14.5, 3),  # in the header of the fourth text
        (14, 3),  # before it
        (16, 4),  # between two records
        (1.5, 0),
        (0.5, 0),
    ],
)
def test_a_tar_file_that_is_cut_short(blocks: float, usable: int, write_tar: WriteTar, open_path: OpenPath) -> None:
    path = cut_tar(write_tar(MEMBERS, "set/a.tar"), blocks)
    write_tar(MEMBERS[:2], "set/b.tar")
    records = list(open_path(path.parent).records())
    *good, tail, after = outcome(records)
    assert good == [f"{number:03}" for number in range(usable)]
    assert tail.startswith("the tar file breaks off here: ")
    assert records[usable].where == "a.tar:end"
    assert after == "000"
    assert open_path(path.parent).count() == usable + 2


def test_a_damaged_header_in_the_middle_is_no_end(write_tar: WriteTar, read_path: ReadPath) -> None:
    path = write_tar(MEMBERS)
    data = bytearray(path.read_bytes())
    data[8 * BLOCK : 8 * BLOCK + 100] = b"?" * 100
    path.write_bytes(data)
    *good, tail = outcome(read_path(path))
    assert good == ["000", "001"]
    assert tail.startswith("the tar file breaks off here: bad checksum at byte 4096")


@pytest.mark.parametrize(
    "data", [b"", b"nothing of the kind" * 100, gzip.compress(b"neither", mtime=0)], ids=["empty", "other", "gzip"]
)
def test_a_file_that_is_no_tar_is_one_problem(data: bytes, tmp_path: Path, read_path: ReadPath) -> None:
    (tmp_path / "d.tar").write_bytes(data)
    [problem] = outcome(read_path(tmp_path / "d.tar"))
    assert problem.startswith("the tar file breaks off here: ")


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz"])
def test_a_compressed_tar_file_that_is_cut_short(suffix: str, tmp_path: Path, read_path: ReadPath) -> None:
    import random

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for number in range(50):
            for name, data in (
                (f"{number:03}.png", random.Random(number).randbytes(2_000)),
                (f"{number:03}.txt", b"a"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (tmp_path / f"whole{suffix}").write_bytes(buffer.getvalue())
    assert outcome(read_path(tmp_path / f"whole{suffix}")) == [f"{number:03}" for number in range(50)]
    (tmp_path / f"cut{suffix}").write_bytes(buffer.getvalue()[:50_000])
    *good, tail = outcome(read_path(tmp_path / f"cut{suffix}"))
    assert good == [f"{number:03}" for number in range(len(good))]
    assert 10 < len(good) < 50
    assert tail.startswith("the tar file breaks off here: ")


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([("x.json", b"{")], "broken JSON in its member 'json': "),
        ([("x.json", b"[]")], "its member 'json' is an array instead of an object"),
        ([("x.png", b"1"), ("x.txt", b"\xff")], "its member 'txt' is no UTF-8 text"),
        ([("x.png", b"1"), ("x.png", b"2"), ("x.txt", b"a")], "the tar file has two members 'x.png'"),
        ([("x.png", b"1")], "no conversation: "),
        ([("x.txt", b"a")], "no conversation: 'caption' stands beside no image"),
        ([("x.png", b"1"), ("x.txt", b" ")], "no answer: turn 2 is empty"),
    ],
)
def test_a_bad_record_of_a_shard_is_alone(
    members: list[tuple[str, bytes]], problem: str, write_tar: WriteTar, read_path: ReadPath
) -> None:
    first, bad, last = outcome(read_path(write_tar([*MEMBERS[:2], *members, *MEMBERS[2:4]])))
    assert (first, last) == ("000", "001")
    assert bad.startswith(problem)


def write_sizes(folder: Path, **sizes: Any) -> None:
    (folder / "sizes.json").write_text(json.dumps({f"{name}.tar": size for name, size in sizes.items()}))


def test_sizes_let_whole_shards_be_skipped(
    write_tar: WriteTar, open_path: OpenPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvila.data.readers.locations import Location

    folder = write_tar(MEMBERS, "set/a.tar").parent
    for name in "bc":
        write_tar(MEMBERS, f"set/{name}.tar")
    write_sizes(folder, a=5, b=5, c=5)
    opened: list[str] = []
    original = Location.open

    def spy(self: Location) -> Any:
        opened.append(self.path[-5:])
        return original(self)

    monkeypatch.setattr(Location, "open", spy)
    stream = open_path(folder)
    assert stream.count() == 15
    assert [record.where for record in stream.records(11, 12)] == ["c.tar:001"]
    assert opened == ["c.tar"]


def test_sizes_that_are_wrong_are_found(write_tar: WriteTar, open_path: OpenPath) -> None:
    folder = write_tar(MEMBERS, "set/a.tar").parent
    write_tar(MEMBERS, "set/b.tar")
    write_sizes(folder, a=7)
    records = list(open_path(folder).records())
    assert outcome(records)[4:7] == ["004", "the shard has 5 records, sizes.json says 7", "000"]
    assert records[6].index == 7
    write_sizes(folder, a=4)
    with pytest.raises(DataError, match=r"a\.tar has more than the 4 records that sizes\.json says"):
        list(open_path(folder).records())
    (folder / "sizes.json").write_text("[1]")
    with pytest.raises(DataError, match=r"sizes\.json does not say how many records"):
        list(open_path(folder).records())


@pytest.mark.parametrize(("blocks", "tail"), [(14.5, 3), (20, 5)])
def test_a_cut_shard_keeps_the_places_of_those_behind_it(
    blocks: float, tail: int, write_tar: WriteTar, open_path: OpenPath
) -> None:
    folder = cut_tar(write_tar(MEMBERS, "set/a.tar"), blocks).parent
    write_tar(MEMBERS, "set/b.tar")
    write_sizes(folder, a=5, b=5)
    records = list(open_path(folder).records())
    assert [record.index for record in records if record.where.startswith("b")] == list(range(5, 10))
    assert len([record for record in records if record.where.startswith("a")]) == min(tail + 1, 5)
    assert [record.where for record in open_path(folder).records(5, 6)] == ["b.tar:000"]
