"""The held-out split: the same every time, and no picture on both sides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvila.data.mixtures import Registry
from nvila.data.readers.record import CountedStream, Record
from nvila.data.records import Message, Part, Sample
from nvila.errors import DataError
from nvila.tuning.splitting import Chosen, split


class Texts:
    """A stream of samples without media."""

    name = "texts"

    def __init__(self, ids: list[str]) -> None:
        self._ids = ids

    def count(self) -> int:
        return len(self._ids)

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        for index, name in enumerate(self._ids[start:stop], start=start):
            message = Message(role="user", content=(Part(type="text", value="?"),))
            yield Record(index=index, where=name, sample=Sample(id=name, source="s", messages=(message,)))


def _keys(stream: CountedStream) -> set[str]:
    return {key for record in stream.records() if record.sample for key in record.sample.images}


def test_no_picture_is_on_both_sides(colors: Path) -> None:
    stream = Registry().open(str(colors))
    sides = split(stream, 0.3)
    train, held_out = Chosen(stream, "train", sides.train), Chosen(stream, "held out", sides.held_out)
    assert train.count() + held_out.count() == 60
    assert held_out.count() > 2
    assert not _keys(train) & _keys(held_out)
    assert [record.index for record in held_out.records()] == list(range(held_out.count()))
    assert [r.sample for r in held_out.records(2, 4)] == [r.sample for r in list(held_out.records())[2:4]]


def test_more_data_moves_nothing_to_the_other_side() -> None:
    few, many = Texts([f"a{n}" for n in range(50)]), Texts([f"a{n}" for n in range(80)])
    assert set(split(few, 0.2).held_out) == {index for index in split(many, 0.2).held_out if index < 50}


def test_another_seed_deals_anew() -> None:
    texts = Texts([f"a{n}" for n in range(50)])
    assert split(texts, 0.2, seed=1) != split(texts, 0.2, seed=2)
    assert split(texts, 0.2, seed=1) == split(texts, 0.2, seed=1)


def test_a_bound_keeps_the_held_out_side_small() -> None:
    assert len(split(Texts([f"a{n}" for n in range(500)]), 0.5, most=7).held_out) == 7


def test_a_small_set_still_holds_something_out() -> None:
    sides = split(Texts(["a", "b", "c"]), 0.01)
    assert len(sides.held_out) == 1
    assert len(sides.train) == 2


def test_samples_about_one_thing_cannot_be_split() -> None:
    with pytest.raises(DataError, match="nothing is left for held out"):
        split(Texts(["a"]), 0.1)
    with pytest.raises(DataError, match="nothing is left for training"):
        split(Texts(["a", "b"]), 1.0)


def test_bad_records_stay_on_the_training_side(tmp_path: Path) -> None:
    lines = [json.dumps({"question": "q", "answer": "a", "id": f"{n}"}) for n in range(20)]
    lines[7] = "{broken"
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    sides = split(Registry().open(str(tmp_path / "data.jsonl")), 0.9)
    assert 7 in sides.train
