"""Clusters: features of the small model's tower, and k-means that puts equal images together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nvila.curation.clusters import NO_IMAGE, write_clusters
from nvila.curation.scorers import load_scorer
from nvila.curation.scoring_run import ScoringRun
from nvila.curation.shards import SCHEMA, Shards
from nvila.curation.windows import FrameSampling
from nvila.errors import CapabilityError


def shards_with(out: Path, features: list[list[float] | None], size: int = 4) -> Shards:
    shards = Shards(directory=out / "shards", size=size, digest="d")
    for number in range(len(features) // size + 1):
        part = features[number * size : (number + 1) * size]
        shards.publish(number, pa.table({"features": pa.array(part, pa.list_(pa.float32()))}), "features")
        rows = [dict.fromkeys(SCHEMA.names)] * len(part)
        shards.publish(number, pa.Table.from_pylist(rows, schema=SCHEMA))
    return shards


def test_like_features_share_a_cluster(tmp_path: Path) -> None:
    features: list[list[float] | None] = [[0.0, 1.0], [9.0, 9.0], None, [0.1, 1.0], [9.0, 9.1], [9.1, 9.0], [0.0, 1.1]]
    assert write_clusters(shards_with(tmp_path, features), tmp_path, num_clusters=2) == 2
    found = pq.read_table(tmp_path / "clusters.parquet")["cluster"].to_pylist()
    assert found[2] == NO_IMAGE
    assert found[0] == found[3] == found[6] != found[1]
    assert found[1] == found[4] == found[5]


@pytest.mark.parametrize(
    ("features", "clusters"),
    [([None] * 5, 0), ([[1.0]] * 9, 1), ([[float(index)] for index in range(9)], 3)],
    ids=["no-images", "one-image", "square-root"],
)
def test_there_are_no_more_clusters_than_images(features: Any, clusters: int, tmp_path: Path) -> None:
    assert write_clusters(shards_with(tmp_path, features), tmp_path) == clusters
    assert pq.read_table(tmp_path / "clusters.parquet").num_rows == len(features)


def features_run(stream: Any, model: Path, out: Path) -> ScoringRun:
    shards = Shards(directory=out / "shards", size=8, digest="d")
    return ScoringRun(
        stream=stream,
        load=lambda which: load_scorer(model, dtype="fp32", device="cpu"),
        samplings=frozenset({FrameSampling(8, 0.0)}),
        shards=shards,
        batch_tokens=256,
    )


def test_features_tell_images_apart_and_not_questions(vqa_stream: Any, small_model: Path, tmp_path: Path) -> None:
    run = features_run(vqa_stream(7, (6, (None, {}, "broken"))), small_model, tmp_path)
    run.run_features()
    features = run.shards.read(0, "features")["features"].to_pylist()
    assert features[0] == features[1] == features[2] != features[3]
    assert features[6] is None
    assert len(features[0]) == 32


def test_a_language_model_has_no_features(vqa_stream: Any, text_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="no vision tower"):
        features_run(vqa_stream(1), text_model, tmp_path).run_features()
