"""What the serve step asks; that it really asks is in the end-to-end test."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from nvila.data.dataset import load_samples
from nvila_pipelines.steps.serve import spread


@pytest.mark.parametrize(("count", "asked"), [(1, 1), (4, 4), (10_000, None)])
def test_questions_are_spread_over_the_split(count: int, asked: int | None, data_dir: Path) -> None:
    samples = load_samples(data_dir, "test")
    chosen = spread(samples, count)
    assert len(chosen) == (len(samples) if asked is None else asked)
    assert len({sample.id for sample in chosen}) == len(chosen)
    assert chosen[0] == samples[0]
    if count == 4:
        positions = [samples.index(sample) for sample in chosen]
        gaps = [after - before for before, after in itertools.pairwise(positions)]
        assert max(gaps) - min(gaps) <= 1
