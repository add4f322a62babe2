"""Everything at once for some time: no answer is lost, mixed up or wrong, and every block comes back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def _benchmarks() -> Iterator[None]:
    folder = Path(__file__).resolve().parents[3] / "benchmarks" / "inference"
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.mark.parametrize(
    "seconds", [3.0, pytest.param(25.0, marks=[pytest.mark.slow, pytest.mark.timeout(400)])], ids=str
)
def test_every_request_gets_its_own_answer(seconds: float) -> None:
    from soak import soak

    tally = soak(seconds, seed=1)
    assert tally.wrong == []
    assert tally.dirty_rounds == 0
    assert tally.outcomes["lost"] == 0
    assert tally.outcomes["answered"] > 0
    # In a few seconds it is a matter of luck who comes.
    assert seconds < 10 or {"cancelled", "late", "poisoned", "shed"} <= set(tally.outcomes)
    assert seconds < 10 or tally.preemptions > 0


def test_growth_is_told_from_noise() -> None:
    from soak import growth

    flat = [(10.0 * at, 400.0 + at % 2) for at in range(60)]
    leak = [(10.0 * at, 400.0 + at) for at in range(60)]
    assert abs(growth(flat)[1]) < 0.3
    assert growth(leak)[0] == pytest.approx(360)
    assert growth(leak)[1] > 5
    assert growth(flat[:3]) == (0.0, 0.0, 400.0)


def test_a_wrong_answer_would_be_seen() -> None:
    from soak_questions import POISON, Question

    from nvila.inference.engine import SamplingParams

    params = SamplingParams(max_tokens=4)
    question = Question(name="text", messages=(), media={}, params=params, reference=(1, 2, 3, 4))
    assert question.judge((1, 2), 2, whole=True) is None
    assert question.judge((1, 2), 3, whole=False) is None
    assert "said [1, 2]" in str(question.judge((1, 2), 3, whole=True))
    assert "said [1, 3]" in str(question.judge((1, 3), 4, whole=False))
    poisoned = Question(name=POISON, messages=(), media={}, params=params, reference=None)
    assert poisoned.judge((), 4, whole=True) == f"{POISON}: was answered"
