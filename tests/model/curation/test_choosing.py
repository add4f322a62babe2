"""From shards to a selection: merging, duplicates, rates, thresholds, baselines, ignore lists."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nvila.curation.choosing import CLUSTERS, Rule, choose, count_sources, file_name, write_selection
from nvila.curation.merging import merge, merged_already, write_quarantine
from nvila.curation.ranking import part_quotas
from nvila.curation.shards import SCHEMA, Shards
from nvila.errors import ArtifactError, ConfigError, DataError


def row(index: int, small: float, large: float, *, source: str = "a", id: str | None = None, **changed: Any) -> Any:
    return {
        "index": index,
        "id": f"q{index}" if id is None else id,
        "source": source,
        "where": f"data.jsonl:{index + 1}",
        "nll_small": small,
        "nll_large": large,
        "tokens_small": 4,
        "tokens_large": 2,
        "status": "ok",
        "reason": None,
    } | changed


def bad(index: int, status: str = "unreadable", **changed: Any) -> Any:
    none: dict[str, Any] = dict.fromkeys(("nll_small", "nll_large", "tokens_small", "tokens_large"))
    return row(index, 0.0, 0.0, **(none | {"status": status, "reason": "broken", "id": ""} | changed))


def shards_of(out: Path, rows: Sequence[Any], size: int = 4) -> Shards:
    shards = Shards(directory=out / "shards", size=size, digest="d")
    for number in range(len(rows) // size + 1):
        part = rows[number * size : (number + 1) * size]
        shards.publish(number, pa.Table.from_pylist(part, schema=SCHEMA))
    return shards


def scored(out: Path, deltas: Sequence[float], sources: Sequence[str] | None = None) -> Path:
    names = sources or ["a"] * len(deltas)
    rows = [row(index, delta, 0.0, source=names[index]) for index, delta in enumerate(deltas)]
    merge(shards_of(out, rows), out, "none")
    return out


def kept(out: Path, **rule: Any) -> list[int]:
    found: list[int] = np.flatnonzero(choose(out, Rule(**rule))).tolist()
    return found


def test_merging_keeps_the_order_and_computes_delta(tmp_path: Path) -> None:
    rows = [row(0, 3.0, 1.0), bad(1), row(2, 1.0, 3.0), row(3, 2.0, 2.0), row(4, 5.0, 1.0)]
    merged = merge(shards_of(tmp_path, rows), tmp_path, "none")
    assert (merged.total, merged.statuses) == (5, {"ok": 4, "unreadable": 1})
    assert merged.first_bad == "data.jsonl:2: broken"
    table = pq.read_table(tmp_path / "scores.parquet").to_pydict()
    assert list(table) == ["id", "source", "nll_small", "nll_large", "delta", "num_answer_tokens", "status"]
    assert table["delta"] == [2.0, None, -2.0, 0.0, 4.0]
    assert table["num_answer_tokens"] == [2, None, 2, 2, 2]
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {"index": 1, "id": "", "source": "a", "where": "data.jsonl:2", "status": "unreadable", "reason": "broken"}
    ]
    assert merged_already("d", tmp_path, "none") == merged
    assert merged_already("d", tmp_path, "token") is None
    assert merged_already("e", tmp_path, "none") is None
    assert merged_already("d", tmp_path / "elsewhere", "none") is None


def test_delta_by_token_divides_by_each_models_tokens(tmp_path: Path) -> None:
    merge(shards_of(tmp_path, [row(0, 8.0, 1.0)]), tmp_path, "token")
    assert pq.read_table(tmp_path / "scores.parquet")["delta"].to_pylist() == [8.0 / 4 - 1.0 / 2]


def test_the_first_of_several_records_with_an_id_counts(tmp_path: Path) -> None:
    rows = [
        row(0, 1.0, 0.0, id="x"),
        row(1, 2.0, 0.0, id="x", source="b"),
        row(2, 3.0, 0.0, id="x"),
        bad(3, "no_answer", id="x"),
        bad(4),
        bad(5),
        row(6, 9.0, 0.0, id="x"),
    ]
    merged = merge(shards_of(tmp_path, rows), tmp_path, "none")
    assert merged.statuses == {"ok": 2, "duplicate": 2, "no_answer": 1, "unreadable": 2}
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["index"], line["status"]) for line in lines] == [
        (2, "duplicate"),
        (3, "no_answer"),
        (4, "unreadable"),
        (5, "unreadable"),
        (6, "duplicate"),
    ]
    assert lines[0]["reason"] == "record 0 (data.jsonl:1) has the same id"
    assert kept(tmp_path, keep_rate=1.0) == [0, 1]


def test_merging_wants_all_shards(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [row(index, 1.0, 0.0) for index in range(9)])
    shards.path(1).unlink()
    with pytest.raises(ArtifactError, match=r"scores-00001\.parquet is not there"):
        merge(shards, tmp_path, "none")


def test_an_empty_data_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no records"):
        merge(shards_of(tmp_path, []), tmp_path, "none")
    assert not (tmp_path / "scores.parquet").exists()


def test_the_quarantine_of_an_early_end_holds_what_is_known(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [bad(0), row(1, 1.0, 0.0)])
    write_quarantine(shards, tmp_path)
    assert len((tmp_path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_the_top_share_of_every_source_is_kept_with_its_own_rate(tmp_path: Path) -> None:
    out = scored(tmp_path, [0.1, 0.8, -1.0, 0.9, 0.5, 7.0, 8.0, 9.0], ["a"] * 5 + ["b"] * 3)
    assert kept(out, keep_rate=0.5) == [1, 3, 4, 6, 7]
    assert kept(out, keep_rate=0.5, rates={"b": 0.1}) == [1, 3, 4, 7]
    assert kept(out, keep_rate=0.0) == []


def test_thresholds_leave_their_place_to_the_next(tmp_path: Path) -> None:
    out = scored(tmp_path, [0.1, 0.8, -1.0, 0.9, 0.5])
    assert kept(out, keep_rate=0.4, max_delta=0.85) == [1, 4]
    assert kept(out, keep_rate=1.0, min_delta=0.5) == [1, 3, 4]


def test_only_scored_records_count_and_can_be_kept(tmp_path: Path) -> None:
    rows = [row(0, 1.0, 0.0), bad(1), bad(2), row(3, 2.0, 0.0)]
    merge(shards_of(tmp_path, rows), tmp_path, "none")
    assert kept(tmp_path, keep_rate=0.5) == [3]
    assert kept(tmp_path, keep_rate=0.9, method="random") == [0, 3]


def test_random_depends_on_the_seed_alone(tmp_path: Path) -> None:
    out = scored(tmp_path, [float(index) for index in range(40)], ["a", "b"] * 20)
    first = kept(out, method="random", seed=1)
    assert first == kept(out, method="random", seed=1)
    assert first != kept(out, method="random", seed=2)
    assert len([index for index in first if index % 2]) == 10


def test_clusters_are_pruned_uniformly(tmp_path: Path) -> None:
    # Source a has clusters of 20, 10 and 10; half of each is kept, whatever delta says.
    out = scored(tmp_path, [float(index) for index in range(40)])
    clusters = np.repeat(np.array([0, 1, 2], np.int32), [20, 10, 10])
    pq.write_table(pa.table({"cluster": clusters}), out / CLUSTERS)
    chosen = kept(out, method="cluster", seed=3)
    assert np.bincount(clusters[chosen]).tolist() == [10, 5, 5]
    assert chosen != kept(out, method="cluster", seed=4)
    assert len(kept(out, method="cluster", keep_rate=0.51)) == math.ceil(0.51 * 40)


@pytest.mark.parametrize(
    ("sizes", "quota", "expected"),
    [([10, 10], 10, [5, 5]), ([3, 3, 3], 4, [2, 1, 1]), ([7, 2, 1], 5, [4, 1, 0]), ([1, 1], 0, [0, 0])],
)
def test_a_quota_is_shared_out_by_size(sizes: list[int], quota: int, expected: list[int]) -> None:
    counts = {("a", part): size for part, size in enumerate(sizes)} | {("b", 0): 5}
    found = part_quotas(counts, {"a": quota, "b": 2})
    assert [found["a", part] for part in range(len(sizes))] == expected
    assert found["b", 0] == 2


def test_selection_and_ignore_lists_complement_each_other(tmp_path: Path) -> None:
    out = scored(tmp_path, [1.0, 5.0, 2.0, 6.0, 3.0, 7.0], ["a", "b/c", "a", "b/c", "a", "b/c"])
    counts = write_selection(out, choose(out, Rule(keep_rate=0.34)))
    table = pq.read_table(out / "selection.parquet").to_pydict()
    assert table["kept"] == [False, False, True, True, True, True]
    assert table["delta"] == [1.0, 5.0, 2.0, 6.0, 3.0, 7.0]
    assert {path.name: json.loads(path.read_text()) for path in (out / "ignore").iterdir()} == {
        "a.json": [0],
        "b%2Fc.json": [0],
    }
    assert (counts["a"].records, counts["a"].scored, counts["a"].kept, counts["a"].boundary) == (3, 3, 2, 2.0)
    assert count_sources(out)["a"].kept == 0
    write_selection(out, choose(out, Rule(keep_rate=1.0)), ranks=[0.5] * 6)
    assert json.loads((out / "ignore" / "a.json").read_text()) == []
    assert pq.read_table(out / "selection.parquet")["delta"].to_pylist() == [0.5] * 6


def test_long_ignore_lists_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvila.curation.choosing._IgnoreLists._FLUSH", 3)
    monkeypatch.setattr("nvila.curation.choosing._BATCH_ROWS", 4)
    out = scored(tmp_path, [float(index) for index in range(30)])
    write_selection(out, choose(out, Rule(keep_rate=0.5)))
    assert json.loads((out / "ignore" / "a.json").read_text()) == list(range(15))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"keep_rate": 1.5}, "keep rate 1.5 of source 'every source' is outside 0..1"),
        ({"rates": {"a": -0.1}}, "keep rate -0.1 of source 'a'"),
        ({"min_delta": 2.0, "max_delta": 1.0}, "min_delta 2 is above max_delta 1"),
        ({"rates": {"cahrt": 0.5}}, "no source 'cahrt'"),
        ({"method": "cluster"}, "clusters.parquet cannot be read"),
    ],
    ids=["rate", "rate-of-source", "thresholds", "unknown-source", "no-clusters"],
)
def test_wrong_rules_are_refused(rule: dict[str, Any], message: str, tmp_path: Path) -> None:
    out = scored(tmp_path, [1.0], ["chart"])
    with pytest.raises((ConfigError, ArtifactError), match=message) as refused:
        kept(out, **rule)
    if "cahrt" in message:
        assert refused.value.hint == "did you mean 'chart'?"


@pytest.mark.parametrize(
    ("source", "name"), [("a b", "a b"), ("../x", "%2E.%2Fx"), (".", "%2E"), ("ä/b", "%C3%A4%2Fb")]
)
def test_no_source_leaves_the_folder_of_the_lists(source: str, name: str) -> None:
    assert file_name(source) == name
