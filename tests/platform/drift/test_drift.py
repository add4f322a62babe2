"""Drift: what is counted, what is kept, and when it says that traffic has changed."""

from __future__ import annotations

import json
import math
import random
import threading
from pathlib import Path

import pytest
from PIL import Image

from nvila.errors import ConfigError
from nvila_platform.drift.features import FEATURES, answer_features, image_features, request_features
from nvila_platform.drift.reference import Bins, Reference, build_reference
from nvila_platform.drift.watch import DriftWatch, read_summary, stability_index, verdict


def picture(level: int, size: tuple[int, int] = (64, 32)) -> Image.Image:
    return Image.new("L", size, level).convert("RGB")


def reference(count: int = 1000, name: str = "brightness") -> Reference:
    return build_reference(({name: [k / count]} for k in range(count)), "even")


def test_an_image_is_described_by_its_size_and_its_light() -> None:
    assert image_features(picture(255, (2000, 500))) == {
        "megapixels": 1.0, "aspect": 4.0, "brightness": 1.0, "contrast": 0.0
    }  # fmt: skip
    half = Image.new("L", (64, 64), 0)
    half.paste(255, (0, 0, 32, 64))
    found = image_features(half)
    assert (found["brightness"], found["contrast"]) == (0.5, 0.5)


def test_flat_images_differ_in_brightness_alone() -> None:
    assert {image_features(picture(level))["contrast"] for level in range(0, 256, 5)} == {0.0}


def test_a_request_is_described_by_all_of_its_parts() -> None:
    found = request_features("what is it?", [picture(0), picture(255)])
    assert found.keys() == FEATURES.keys() - {"answer_letters"}
    assert (found["images"], found["prompt_letters"], found["brightness"]) == ([2.0], [11.0], [0.0, 1.0])
    assert request_features("hello", []) == {"images": [0.0], "prompt_letters": [5.0]}
    assert answer_features(4) == {"answer_letters": [4.0]}


def test_bins_hold_equally_many_values() -> None:
    bins = reference().features["brightness"]
    assert len(bins.counts) == 10
    assert set(bins.counts) == {100}
    assert [bins.place(value) for value in (-1.0, 0.0999, 0.1, 0.95, 7.0)] == [0, 0, 1, 9, 9]


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ([1.0] * 40 + [2.0] * 60, (40, 60)),
        ([3.0] * 50, (0, 50, 0)),
        ([1.0, 2.0, 3.0], (1, 2)),
    ],
    ids=["two values", "one value", "three samples"],
)
def test_equal_values_share_a_bin(values: list[float], counts: tuple[int, ...]) -> None:
    made = build_reference(({"images": [value]} for value in values), "few")
    assert made.features["images"].counts == counts


def test_values_on_both_sides_of_a_constant_are_seen() -> None:
    watch = DriftWatch(build_reference(({"images": [1.0]} for _ in range(100)), "one image"), share=1, least=1)
    watch.add({"images": [0.0, 1.0, 4.0]})
    assert watch.drifts()[0].counts == (1, 1, 1)


def test_the_index_is_that_of_the_definition() -> None:
    p, q = (50.5 / 101, 50.5 / 101), (10.5 / 101, 90.5 / 101)
    expected = sum((b - a) * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert stability_index((50, 50), (10, 90)) == pytest.approx(expected)
    assert stability_index((10, 90), (50, 50)) == pytest.approx(expected)
    assert stability_index((50, 50), (500, 500)) == pytest.approx(0)
    assert stability_index((100, 0), (0, 100)) > 5
    assert [verdict(psi) for psi in (None, 0.05, 0.1, 0.3)] == ["too few", "steady", "moving", "drifted"]


def test_equal_traffic_is_steady_and_darker_traffic_is_not() -> None:
    rng = random.Random(0)
    watch = DriftWatch(reference(), share=1, window=1000, least=200)
    for _ in range(1000):
        watch.add({"brightness": [rng.random()]})
    (drift,) = watch.drifts()
    assert verdict(drift.psi) == "steady"
    for _ in range(1000):
        watch.add({"brightness": [rng.random() ** 3]})
    (drift,) = watch.drifts()
    assert verdict(drift.psi) == "drifted"
    assert drift.seen == 1000


def test_the_window_forgets_and_agrees_with_a_recount() -> None:
    watch = DriftWatch(reference(), share=1, window=50, least=1)
    values = [random.Random(k).random() for k in range(300)]
    for value in values:
        watch.add({"brightness": [value]})
    bins = watch.reference.features["brightness"]
    recount = [0] * len(bins.counts)
    for value in values[-50:]:
        recount[bins.place(value)] += 1
    assert watch.drifts()[0].counts == tuple(recount)


def test_no_number_before_enough_was_seen_and_nothing_that_is_not_known() -> None:
    watch = DriftWatch(reference(), share=1, window=10, least=3)
    watch.add({"brightness": [0.1, math.nan, math.inf], "unknown": [1.0]})
    watch.add({"brightness": [0.2]}, request=False)
    (drift,) = watch.drifts()
    assert (drift.psi, drift.seen, watch.requests) == (None, 2, 1)
    watch.add({"brightness": [0.2]})
    assert watch.drifts()[0].psi is not None


def test_the_share_of_requests_is_that_asked_for() -> None:
    watch = DriftWatch(reference(), share=0.2, seed=3)
    assert 1700 < sum(watch.chosen() for _ in range(10_000)) < 2300


def test_threads_lose_nothing() -> None:
    watch = DriftWatch(reference(), share=1, window=10_000, least=1)

    def send() -> None:
        for _ in range(1000):
            watch.add({"brightness": [0.5]})

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (watch.requests, watch.drifts()[0].seen) == (4000, 4000)


def test_the_summary_holds_counts_and_nothing_of_a_request() -> None:
    watch = DriftWatch(reference(), share=1, least=1)
    watch.add(request_features("my secret question", [picture(77)]))
    text = json.dumps(watch.to_dict())
    assert "secret" not in text
    summary = read_summary(json.loads(text))
    assert summary["requests"] == 1
    assert sum(summary["features"]["brightness"]["now"]) == 1
    with pytest.raises(ConfigError, match="no summary of drift"):
        read_summary({"features": {"brightness": {"now": [1], "reference": [1, 2], "edges": [0.5]}}})
    with pytest.raises(ConfigError, match="no summary of drift"):
        read_summary({"error": "not found"})


def test_a_reference_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = build_reference([request_features("a", [picture(9)]) | answer_features(1) for _ in range(30)], "mine")
    made.write(tmp_path / "deep" / "drift.json")
    assert Reference.read(tmp_path / "deep" / "drift.json") == made


def features(edges: list[float], counts: list[int]) -> str:
    bins = {"edges": edges, "counts": counts}
    return json.dumps({"schema": 1, "data": "d", "samples": 1, "features": {"images": bins}})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no reference of drift"),
        ("[]", "is no reference of drift"),
        ('{"schema": 2}', "is of schema 2, this version reads 1"),
        (features([2, 1], [1, 1, 1]), "is no reference of drift"),
        (features([1], [1]), "is no reference of drift"),
        (features([], [1]), "is no reference of drift"),
        (features([1], [1, -1]), "is no reference of drift"),
    ],
)
def test_a_file_that_is_no_reference_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "drift.json").write_text(text)
    with pytest.raises(ConfigError, match=said):
        Reference.read(tmp_path / "drift.json")


def test_what_cannot_be_watched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"drift\.json cannot be read"):
        Reference.read(tmp_path / "drift.json")
    with pytest.raises(ConfigError, match="empty has no usable sample"):
        build_reference([], "empty")
    for share in (0, 1.5, -1):
        with pytest.raises(ConfigError, match="share of requests"):
            DriftWatch(reference(), share=share)
    with pytest.raises(ConfigError, match="needs 11 values of a window of 10"):
        DriftWatch(reference(), window=10, least=11)
    assert Bins(edges=(1.0,), counts=(1, 1)).place(1.0) == 1
