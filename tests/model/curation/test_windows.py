"""Windows and batches: media are read and decoded once, memory is bounded, little is padding."""

from __future__ import annotations

from typing import Any

import pytest

from nvila.curation.batching import batches, row_length
from nvila.curation.problems import Problem
from nvila.curation.windows import ahead, windows
from nvila.data.conversation import Encoded
from nvila.data.records import Sample, vqa_sample
from nvila.errors import DataError, InfrastructureError


def test_neighbours_share_what_is_the_same_picture(vqa_stream: Any, encoded_pictures: dict[str, bytes]) -> None:
    stream = vqa_stream(12)
    source = type(stream.rows[0][1]["a.png"])(encoded_pictures["a"])
    for index in (0, 1, 2):
        stream.rows[index] = (stream.rows[index][0], {"a.png": source}, None)
    # The same bytes under another name.
    copy = vqa_sample(id="copy", source="a", image="copy.png", question="what?", answer="red")
    stream.rows[3] = (copy, {"copy.png": type(source)(encoded_pictures["a"])}, None)
    (window,) = windows(stream.records(), frozenset())
    assert len(source.reads) == 1
    assert len(window.images) == 4
    keys = [sample.images for sample in window.samples if isinstance(sample, Sample)]
    assert keys[0] == keys[1] == keys[2] == keys[3] != keys[4]


def test_windows_end_at_a_number_of_records_or_bytes(vqa_stream: Any) -> None:
    records = [len(window.records) for window in windows(vqa_stream(20).records(), frozenset(), max_records=8)]
    assert records == [8, 8, 4]
    picture = 3 * 40 * 40
    sizes = [len(window.records) for window in windows(vqa_stream(20).records(), frozenset(), max_bytes=2 * picture)]
    # A window ends with the record that brings its second picture.
    assert sizes == [4, 3, 3, 3, 3, 3, 1]


def test_records_with_a_problem_keep_their_place(vqa_stream: Any) -> None:
    stream = vqa_stream(5, (2, (None, {}, "broken JSON")))
    (window,) = windows(stream.records(), frozenset())
    assert window.samples[2] == Problem(status="unreadable", reason="broken JSON")
    assert [isinstance(sample, Sample) for sample in window.samples] == [True, True, False, True, True]


def test_a_store_that_does_not_answer_is_no_fault_of_a_record(vqa_stream: Any) -> None:
    class Away:
        def read(self) -> bytes:
            raise InfrastructureError("S3 does not answer", "")

    stream = vqa_stream(5)
    stream.rows[3] = (stream.rows[3][0], {"b.png": Away()}, None)
    with pytest.raises(InfrastructureError, match="S3 does not answer"):
        list(windows(stream.records(), frozenset()))


def test_what_is_made_ahead_raises_where_it_is_used() -> None:
    def items() -> Any:
        yield 1
        raise DataError("gone", "")

    made = ahead(items())
    assert next(made) == 1
    with pytest.raises(DataError, match="gone"):
        next(made)


def sample(length: int, image: str = "", answer: int = 1, prefix: int = 0, first: int = 1000) -> Encoded:
    start = tuple(range(100, 100 + prefix))
    ids = start + tuple(range(first, first + length - prefix))
    labels = (-100,) * (length - answer) + ids[length - answer :]
    return Encoded(ids=ids, labels=labels, images=(image,) if image else (), media_end=prefix)


def test_rows_of_like_length_fill_batches_up_to_the_budget() -> None:
    lengths = [5, 50, 6, 48, 7, 52, 4, 49]
    found = batches({index: sample(length) for index, length in enumerate(lengths)}, 100)
    assert found == [[(6,), (0,), (2,), (4,)], [(3,), (7,)], [(1,)], [(5,)]]


def test_a_row_beyond_the_budget_is_a_batch_of_its_own() -> None:
    assert batches({0: sample(500), 1: sample(3)}, 100) == [[(1,)], [(0,)]]


def test_samples_that_share_a_prefix_share_a_row_within_the_budget() -> None:
    encoded = {index: sample(30, "a", prefix=20, first=1000 * index) for index in range(6)}
    encoded[6] = sample(30, "b", prefix=20)
    assert batches(encoded, 60) == [[(6,)], [(4, 5)], [(0, 1, 2, 3)]]
    assert row_length([encoded[index] for index in (0, 1, 2, 3)]) == 60


def test_samples_about_one_picture_without_a_common_prefix_stay_apart() -> None:
    encoded = {0: sample(30, "a"), 1: sample(30, "a", first=2000)}
    assert batches(encoded, 100) == [[(0,), (1,)]]
