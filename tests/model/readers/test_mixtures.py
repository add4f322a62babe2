"""Names, expressions, selections, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from nvila.data.mixture_expression import Term, parse_expression
from nvila.data.mixtures import Registry
from nvila.data.readers.record import RecordStream
from nvila.data.readers.stream import FileStream
from nvila.errors import ConfigError, DataError, NvilaError

WriteRegistry = Callable[..., str]


def ids(stream: RecordStream, start: int = 0, stop: int | None = None) -> list[str]:
    records = list(stream.records(start, stop))
    assert [record.index for record in records] == list(range(start, start + len(records)))
    return [record.sample.id if record.sample else "-" for record in records]


@pytest.fixture
def write_registry(tmp_path: Path) -> WriteRegistry:
    """Three small data sets (`a` of 3 records, `b` of 2, `c` of 4 in the folder `sets`) and a registry beside them."""
    import yaml

    for name, count in (("a", 3), ("b", 2), ("c", 4)):
        path = tmp_path / "sets" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        rows = [{"id": f"{name}{number}", "question": "Q", "answer": "A"} for number in range(count)]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def write(**entries: Any) -> str:
        sets: Mapping[str, Any] = {name: {"path": f"sets/{name}.jsonl"} for name in "abc"}
        (tmp_path / "mixtures.yaml").write_text(yaml.safe_dump({**sets, **entries}))
        return str(tmp_path / "mixtures.yaml")

    return write


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("a", [Term("a")]),
        ("a+b*3", [Term("a"), Term("b", 3)]),
        (" a * 2 @ half + b ", [Term("a", 2, "half"), Term("b")]),
        ("a@out/selection.parquet", [Term("a", 1, "out/selection.parquet")]),
        ("data/*.parquet", [Term("data/*.parquet")]),
        ("data/*.parquet*3", [Term("data/*.parquet", 3)]),
        ("'a+b.jsonl'*2 + \"c d@e\"", [Term("a+b.jsonl", 2), Term("c d@e")]),
        ("s3://b/x@s3://b/y", [Term("s3://b/x", 1, "s3://b/y")]),
        ("easy-vqa:test", [Term("easy-vqa:test")]),
    ],
)
def test_an_expression_is_read(text: str, terms: list[Term]) -> None:
    assert parse_expression(text) == terms


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be read from character 1 on"),
        ("a+", "cannot be read from character 3 on"),
        ("a++b", "cannot be read from character 3 on"),
        ("a b", "cannot be read from character 1 on"),
        ("a@", "cannot be read from character 1 on"),
        ("a@x@y", "cannot be read from character 1 on"),
        ("'a", "cannot be read from character 1 on"),
        ("a@half*3", r"'half\*3' is no selection .write the number first"),
        ("a*0", "repeats 'a' 0 times"),
    ],
)
def test_another_spelling_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_expression(text)


def test_a_mixture_is_its_parts_in_order(write_registry: WriteRegistry) -> None:
    registry = Registry.load(write_registry())
    stream = registry.open("a + b*3")
    everything = ["a0", "a1", "a2", "b0", "b1", "b0", "b1", "b0", "b1"]
    assert (stream.name, stream.count(), ids(stream)) == ("a + b*3", 9, everything)
    for start in range(10):
        for stop in (*range(start, 11), None):
            assert ids(registry.open("a + b*3"), start, stop) == everything[start:stop]
            assert ids(stream, start, stop) == everything[start:stop]


def test_a_part_is_not_counted_when_the_range_ends_in_it(
    write_registry: WriteRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: FileStream) -> int:
        raise AssertionError("counted")

    stream = Registry.load(write_registry()).open("a + b")
    monkeypatch.setattr(FileStream, "count", fail)
    assert ids(stream, 0, 3) == ["a0", "a1", "a2"]
    assert ids(stream, 1, 2) == ["a1"]


def test_sources_are_the_names_of_the_data_sets(write_registry: WriteRegistry) -> None:
    stream = Registry.load(write_registry(d={"path": "sets/c.jsonl", "source": "mine"})).open("a+d")
    sources = [record.sample.source for record in stream.records() if record.sample]
    assert sources == ["a", "a", "a", "mine", "mine", "mine", "mine"]


def test_names_nest_and_repeats_multiply(write_registry: WriteRegistry, tmp_path: Path) -> None:
    (tmp_path / "drop.json").write_text("[0]")
    registry = Registry.load(write_registry(two="b*2 + a", four="c + two*2@drop.json"))
    assert ids(registry.open("four")) == ["c0", "c1", "c2", "c3", *["b1"] * 4, *["a1", "a2"] * 2]
    assert [(leaf.name, leaf.times) for leaf in registry.expand("four")] == [("c", 1), ("b", 4), ("a", 2)]


def test_paths_need_no_registry(write_registry: WriteRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry.load(write_registry(d="sets/b.jsonl + a"))
    (tmp_path / "sets" / "x+y.jsonl").write_text((tmp_path / "sets" / "b.jsonl").read_text())
    assert ids(registry.open("d")) == ["b0", "b1", "a0", "a1", "a2"]
    assert ids(Registry().open(f"{tmp_path}/sets/[ab].jsonl")) == ["a0", "a1", "a2", "b0", "b1"]
    assert ids(Registry().open(f"{tmp_path}/sets/x+y.jsonl")) == ["b0", "b1"]
    monkeypatch.chdir(tmp_path / "sets")
    assert ids(Registry().open("a.jsonl*2 + 'x+y.jsonl'")) == ["a0", "a1", "a2", "a0", "a1", "a2", "b0", "b1"]
    (tmp_path / "sets" / "folder").mkdir()
    (tmp_path / "sets" / "folder" / "d.jsonl").write_text('{"id": "d", "question": "Q", "answer": "A"}\n')
    assert ids(Registry().open("folder")) == ["d"]


def test_fields_of_an_entry_reach_the_reader(write_registry: WriteRegistry, tmp_path: Path) -> None:
    (tmp_path / "odd.txt").write_text('{"query": "Q", "label": "A", "image": "1.png"}\n')
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "1.png").write_bytes(b"one")
    entry = {
        "path": "odd.txt",
        "format": "jsonl",
        "media_dir": "media",
        "rename": {"query": "question", "label": "answer"},
    }
    [record] = Registry.load(write_registry(odd=entry)).open("odd").records()
    assert record.sample is not None
    assert (record.sample.question, record.sample.answer) == ("Q", "A")
    assert [source.read() for source in record.media.values()] == [b"one"]


@pytest.mark.parametrize(
    ("entries", "expression", "says"),
    [
        ({}, "bb", "there is no data set 'bb' .did you mean 'b'"),
        ({}, "easyvqa", "did you mean 'easy-vqa'"),
        ({"m": "a + n", "n": "b + m"}, "m", "mixtures contain each other: m -> n -> m"),
        ({"m": "a + m"}, "a+m", "mixtures contain each other: m -> m"),
        ({"m": "a ++ b"}, "m", "cannot be read from character 4 on"),
        ({}, "a@nowhere", "the selection .*nowhere does not exist"),
        ({"d": {"path": "sets/a.jsonl", "formt": "json"}}, "d", "d: unknown field 'formt' .did you mean 'format'"),
        ({"d": {"format": "json"}}, "d", "d has no path"),
        ({"d": {"path": 5}}, "d", r"d\.path is 5 .expected a valid string"),
        ({"d": {"path": "x", "rename": {"q": "qestion"}}}, "d", "there is no field 'qestion' .did you mean 'question'"),
        ({"d": {"path": "sets/a.jsonl", "format": "jsnl"}}, "d", "'jsnl' is not a data format .did you mean 'json"),
        ({"d": 5}, "d", "mixtures.yaml: d is 5"),
        ({"a+b": "a"}, "a", "a\\+b is no name of a data set"),
        ({"easy-vqa": "a"}, "a", "easy-vqa is the name of a built-in data set"),
        ({"d": {"path": "gs://x/y"}}, "d", "no file system for gs://"),
    ],
)
def test_wrong_names_are_named(
    entries: dict[str, Any], expression: str, says: str, write_registry: WriteRegistry
) -> None:
    with pytest.raises(ConfigError, match=says):
        Registry.load(write_registry(**entries)).open(expression)


def test_a_place_without_a_file_system_is_named() -> None:
    with pytest.raises(ConfigError, match="no file system for gs://"):
        Registry().open("gs://bucket/x")


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (b"- a", ConfigError, "is no mapping of names"),
        (b"a: x\nb: 'y", ConfigError, "mixtures.yaml line 2"),
        (b"a: {path: x}\na: {path: y}\n", ConfigError, "the key 'a' stands twice"),
        (b"\xff", ConfigError, "is no UTF-8 text"),
        (None, DataError, "does not exist"),
    ],
)
def test_a_registry_that_cannot_be_read(text: bytes | None, error: type[NvilaError], says: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "mixtures.yaml").write_bytes(text)
    with pytest.raises(error, match=says):
        Registry.load(str(tmp_path / "mixtures.yaml"))
