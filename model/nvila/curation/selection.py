"""DeltaLoss selection (paper section 2.2, equation 1).

delta(x) = log p_large(answer | x) - log p_small(answer | x). Near zero, both models find a sample easy or both fail;
clearly negative, only the small one is right, which points at noise; positive samples teach something. Of every
source the top ceil(rate * n) are kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

from nvila.curation.ranking import CANDIDATES, quota, rate_of, top_of_parts
from nvila.errors import ConfigError

Normalize = Literal["none", "token"]
Centre = Literal["none", "answer"]


def centre(deltas: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """Subtract from every delta the mean of its group.

    Not in the paper. Where a scorer answers from habit, delta is the same number for all samples with one question
    and one answer, and the top half of a source is then made of some answers and none of the others: a model trained
    on it learns the selection instead of the images. Centred by question and answer, delta compares images only and
    the kept part has the answers of the whole.

    Args:
        deltas: Score of every sample.
        groups: What each sample is compared within, such as its question and answer.
    """
    members: dict[Hashable, list[float]] = {}
    for delta, group in zip(deltas, groups, strict=True):
        members.setdefault(group, []).append(delta)
    means = {group: math.fsum(values) / len(values) for group, values in members.items()}
    return [delta - means[group] for delta, group in zip(deltas, groups, strict=True)]


def round_to(deltas: Sequence[float], resolution: float) -> list[float]:
    """Round deltas to multiples of a resolution in nats, so that smaller differences are ties.

    Not in the paper. Differences below what the scorers' own training noise makes of them are no evidence, but they
    follow properties of the image and would remove whole kinds of images from a question.

    Args:
        deltas: Score of every sample.
        resolution: Smallest difference that counts; 0 leaves the scores as they are.
    """
    return list(deltas) if resolution == 0 else [round(delta / resolution) * resolution for delta in deltas]


def select_top(deltas: Sequence[float], sources: Sequence[str], rates: Mapping[str, float] | float) -> list[bool]:
    """Keep the top ceil(rate * n) samples of every source; ties go to the earlier sample.

    Args:
        deltas: Score of every sample.
        sources: Source of every sample.
        rates: Keep rate, one for all or by source.

    Returns:
        Whether each sample is kept.

    Raises:
        ConfigError: A rate is outside 0..1, a source has no rate, or a score is NaN.
    """
    import pyarrow as pa

    counts = Counter(sources)
    quotas = {(source, 0): quota(rate_of(source, rates), count) for source, count in counts.items()}
    for delta, source in zip(deltas, sources, strict=True):
        if math.isnan(delta):
            raise ConfigError(f"source '{source}' has samples with a NaN score", "check the scorers' training")
    rows = {"index": range(len(deltas)), "source": sources, "part": [0] * len(deltas), "key": deltas}
    table = pa.table({name: list(rows[name]) for name in CANDIDATES.names}, schema=CANDIDATES)
    chosen: list[bool] = top_of_parts(table.to_batches(), quotas, len(deltas)).tolist()
    return chosen
