"""Whatever stands in the lines: as many records as lines, and no exception but typed errors."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvila.data.mixture_expression import parse_expression
from nvila.data.readers.opening import DatasetSpec, open_dataset
from nvila.data.readers.record import Record
from nvila.errors import ConfigError, DataError

texts = st.text(max_size=8) | st.sampled_from(
    ["<image>", "<image>\n", "<video> a <image>", " ", "1.png", "../x", "data:,"]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
senders = st.sampled_from(["human", "gpt", "user", "assistant", "system", "bot"])
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "video", "image_url", "audio"]) | anything},
    optional=dict.fromkeys(("text", "image", "path", "image_url", "base64"), texts | anything),
)
turns = st.fixed_dictionaries(
    {},
    optional={
        "from": senders | anything,
        "role": senders | anything,
        "value": texts | anything,
        "content": texts | st.lists(parts | texts, max_size=3) | anything,
    },
)
records = st.fixed_dictionaries(
    {},
    optional={
        "id": texts | st.integers() | anything,
        "source": texts | anything,
        "image": texts | st.lists(texts, max_size=3) | anything,
        "images": texts | st.lists(texts | anything, max_size=3) | anything,
        "video": texts | anything,
        "conversations": st.lists(turns, max_size=4) | anything,
        "messages": st.lists(turns | anything, max_size=4) | anything,
        "texts": st.lists(st.dictionaries(st.sampled_from(["user", "assistant"]), texts), max_size=2) | anything,
        "question": texts | anything,
        "answer": texts | anything,
        "answers": st.lists(texts | anything, max_size=3) | anything,
        "caption": texts | anything,
    },
)
lines = st.one_of(
    records.map(json.dumps).map(str.encode),
    anything.map(json.dumps).map(str.encode),
    st.binary(max_size=40).map(lambda data: data.replace(b"\n", b"")),
    st.tuples(records.map(json.dumps).map(str.encode), st.integers(0, 60)).map(lambda pair: pair[0][: pair[1]]),
)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(record: Record) -> None:
    """A record is a sample that can be written and read, or one line that says why not."""
    if record.sample is None:
        assert record.problem
        assert record.problem.splitlines() == [record.problem]
        record.problem.encode()
        return
    assert record.problem is None
    json.dumps(record.sample.to_dict(), ensure_ascii=False).encode()
    assert record.sample.answer.strip()
    assert {part.value for one in record.sample.messages for part in one.content if part.type != "text"} == set(
        record.media
    )
    for source in record.media.values():
        try:
            assert isinstance(source.read(), bytes)
        except DataError as e:
            assert str(e)  # noqa: PT017 - any other exception is what is looked for


@QUICK
@given(content=st.lists(lines, max_size=6))
def test_json_lines(content: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in content))
    stream = open_dataset(DatasetSpec(path=str(path)))
    found = list(stream.records())
    assert [record.index for record in found] == list(range(len(content)))
    assert stream.count() == len(content)
    for record in found:
        check(record)


@QUICK
@given(content=st.lists(lines, max_size=4), cut=st.integers(0, 200))
def test_json_arrays(content: list[bytes], cut: int, tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    data = b"[" + b",".join(content) + b"]"
    path.write_bytes(data[: max(1, len(data) - cut)])
    stream = open_dataset(DatasetSpec(path=str(path), format="json"))
    found = list(stream.records())
    assert stream.count() == len(found)
    for record in found:
        check(record)


@QUICK
@given(
    members=st.lists(
        st.tuples(st.sampled_from(["a", "b", "c/d", ""]), st.sampled_from(["jpg", "txt", "json", "cls", "x"]), lines),
        max_size=5,
    ),
    damage=st.none() | st.tuples(st.integers(0, 6_000), st.binary(min_size=1, max_size=20)),
    cut=st.integers(0, 30).map(lambda blocks: max(0, blocks - 15) * 700),
)
def test_shards(members: list[tuple[str, str, bytes]], damage: Any, cut: int, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key, suffix, data in members:
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    content = bytearray(buffer.getvalue())
    if damage is not None:
        content[damage[0] : damage[0] + len(damage[1])] = damage[1]
    path = tmp_path / "d.tar"
    path.write_bytes(content[: max(0, len(content) - cut)])
    stream = open_dataset(DatasetSpec(path=str(path)))
    found = list(stream.records())
    assert stream.count() == len(found)
    for record in found:
        check(record)


@QUICK
@given(text=st.text("ab*@+\"' /.3", max_size=20))
def test_expressions(text: str) -> None:
    try:
        terms = parse_expression(text)
    except ConfigError as e:
        assert text in str(e) or repr(text) in str(e)  # noqa: PT017 - any other exception is what is looked for
        return
    assert all(term.name and term.times > 0 and term.selection != "" for term in terms)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_damaged_tables(kind: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"question": ["Q"] * 50, "answer": [f"A{number}" * 5 for number in range(50)]})
    path = tmp_path / f"d.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=10)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    whole = path.read_bytes()

    @settings(QUICK, max_examples=80)
    @given(at=st.integers(0, len(whole)), data=st.binary(min_size=1, max_size=30), cut=st.booleans())
    def read(at: int, data: bytes, cut: bool) -> None:
        path.write_bytes(whole[:at] + data + (b"" if cut else whole[at + len(data) :]))
        try:
            for record in open_dataset(DatasetSpec(path=str(path))).records():
                check(record)
        except DataError as e:
            assert str(path) in str(e)  # noqa: PT017 - a file that cannot be opened at all

    read()
