"""Clusters of records whose images look alike to the small model: k-means over its vision features."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from nvila.curation.choosing import CLUSTERS
from nvila.curation.shards import ParquetFile, Shards

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NO_IMAGE = -1
_SCHEMA = pa.schema([("cluster", pa.int32())])
# Enough to place the centres; more features would only cost memory and time.
_FITTED = 50_000
_MAX_CLUSTERS = 256


def write_clusters(shards: Shards, out: Path, *, num_clusters: int | None = None, seed: int = 0) -> int:
    """Write `clusters.parquet`: the cluster of every record, `NO_IMAGE` for those without an image that can be read.

    The centres are found on an even sub-sample; every record then goes to the nearest one.

    Args:
        shards: With the features of all records.
        out: Directory of the file.
        num_clusters: How many at most; by default the square root of the number of records with an image, up to 256.
        seed: Of k-means.

    Returns:
        The number of clusters.
    """
    import numpy as np

    numbers = shards.finished() or []
    total = sum(int(present.sum()) for _, present in _features(shards, numbers))
    centres = _centres(shards, numbers, total, num_clusters, seed) if total else None
    with ParquetFile(out / CLUSTERS, _SCHEMA) as file:
        for features, present in _features(shards, numbers):
            clusters = np.full(len(present), NO_IMAGE, np.int32)
            if centres is not None and len(features):
                clusters[present] = centres.predict(features)
            file.write(pa.table({"cluster": clusters}, schema=_SCHEMA))
    return 0 if centres is None else len(centres.cluster_centers_)


def _centres(shards: Shards, numbers: Sequence[int], total: int, num_clusters: int | None, seed: int) -> Any:
    import numpy as np
    from sklearn.cluster import KMeans

    stride = math.ceil(total / _FITTED)
    sample, position = [], 0
    for features, _ in _features(shards, numbers):
        sample.append(features[-position % stride :: stride])
        position += len(features)
    fitted = np.concatenate(sample)
    # More centres than different images would leave some without any.
    most = min(num_clusters or min(_MAX_CLUSTERS, math.isqrt(total)), len(np.unique(fitted, axis=0)))
    return KMeans(n_clusters=most, random_state=seed, n_init=1).fit(fitted)


def _features(shards: Shards, numbers: Sequence[int]) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """Yield the features of each shard's records that have any, and which records those are."""
    import numpy as np

    for number in numbers:
        column = shards.read(number, "features")["features"].combine_chunks()
        present = column.is_valid().to_numpy(zero_copy_only=False)
        values = column.drop_null().flatten().to_numpy(zero_copy_only=False)
        count = int(present.sum())
        yield values.reshape(count, -1) if count else np.zeros((0, 1), np.float32), present
