"""The simulated autoscaler behind benchmarks/serving/autoscaling.py keeps the rules that it claims to."""

from __future__ import annotations

import importlib
import random
from collections import deque
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks" / "serving"


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scaling")


@pytest.mark.parametrize(
    ("pods", "metric", "wanted"),
    [(2, 8, 2), (2, 8.7, 2), (2, 9, 3), (2, 7.3, 2), (1, 40, 5), (5, 100, 10), (2, 400, 6), (19, 400, 20)],
    ids=["at target", "tolerated", "one more", "tolerated below", "at most four", "at most double", "burst", "highest"],
)
def test_pods_are_added_by_kubernetes_rules(scaling: ModuleType, pods: int, metric: float, wanted: int) -> None:
    assert scaling.decide(pods, metric, scaling.Policy(target=4), deque(), 0) == wanted


def test_pods_are_taken_away_only_to_the_highest_wish_of_the_window(scaling: ModuleType) -> None:
    policy, wishes = scaling.Policy(target=4), deque([(0, 5), (100, 3)])
    assert scaling.decide(6, 4, policy, wishes, 299) == 5
    assert scaling.decide(5, 4, policy, wishes, 301) == 3
    assert scaling.decide(3, 0, policy, wishes, 1000) == 1


def test_speed_is_interpolated_and_never_better_than_recorded(scaling: ModuleType) -> None:
    speed = scaling.PodSpeed(in_flight=(1.0, 4.0), rates=(2.0, 5.0))
    assert [speed.rate(load) for load in (0, 0.5, 1, 2.5, 4, 99)] == [0, 1, 2, 3.5, 5, 5]
    assert speed.best == 5
    assert speed.load(3.5) == pytest.approx(2.5)
    assert speed.load(1.0) == pytest.approx(0.5)


def test_arrivals_have_the_mean_that_was_asked_for(scaling: ModuleType) -> None:
    draw = random.Random(0)
    for mean in (0.0, 3.0, 1200.0):
        drawn = [scaling.poisson(mean, draw) for _ in range(300)]
        assert sum(drawn) / 300 == pytest.approx(mean, rel=0.1)


def test_no_more_than_the_share_is_taken_away_in_a_minute(scaling: ModuleType) -> None:
    policy = scaling.Policy(target=4, down_share=0.2)
    assert scaling.decide(20, 8, policy, deque(), 0) == 16
    # Four went within the last minute already.
    assert scaling.decide(16, 8, policy, deque(), 45, 20) == 16
    assert scaling.decide(16, 8, policy, deque(), 60, 16) == 12
    # A share is rounded up, so that few pods become fewer too.
    assert scaling.decide(3, 4, policy, deque(), 0) == 2


def test_a_step_is_answered_and_settles(scaling: ModuleType) -> None:
    speed = scaling.PodSpeed(in_flight=(1.0, 8.0), rates=(20.0, 80.0))
    load = scaling.stepped([(0, 40.0), (600, 240.0)])
    policy = scaling.Policy(target=2, start_s=30, down_share=0.2)
    line = scaling.simulate(load, 3600, speed, policy, seed=0)
    # Three pods of 80 a second would just do.
    assert 4 <= line.level(2400, 3600) <= 9
    assert line.strays(2400, 3600) <= 2
    assert 0 < line.settled(600, 3600) < 1800
    # New pods answer only after their start.
    first = next(k for k in range(600, 3600) if line.pods[k] > line.pods[599])
    assert line.ready[first + 29] == line.ready[first - 1]
    assert line.ready[first + 30] > line.ready[first - 1]


def test_the_autoscaler_hears_of_a_step_a_scrape_later_at_its_next_look(scaling: ModuleType) -> None:
    speed = scaling.PodSpeed(in_flight=(1.0, 8.0), rates=(20.0, 80.0))
    load = scaling.stepped([(0, 0.0), (61, 5000.0)])
    line = scaling.simulate(load, 120, speed, scaling.Policy(target=2), seed=0)
    # It looks at 75 s and hears of 60 s; at 90 s it hears of 75 s.
    assert line.pods[89] == 1
    assert line.pods[90] == 5
    assert line.pods[105] == 10


def test_what_is_in_hand_follows_from_the_rate(scaling: ModuleType) -> None:
    speed = scaling.PodSpeed(in_flight=(1.0, 8.0), rates=(20.0, 80.0))
    fixed = scaling.Policy(target=2, lowest=4, highest=4)
    idle = scaling.simulate(lambda now: 40.0, 2000, speed, fixed, seed=1)
    # Four pods of 10 a second have half a request each.
    assert sum(idle.load) / 2000 == pytest.approx(2.0, rel=0.05)
    # Beyond 320 a second a queue grows by what is too much.
    busy = scaling.simulate(lambda now: 420.0, 100, speed, fixed, seed=1)
    assert busy.load[-1] == pytest.approx(100 * 100 + 32, rel=0.05)


def test_straying_and_settling_are_measured_from_the_median(scaling: ModuleType) -> None:
    line = scaling.Timeline(pods=[1, 1, 9, 5, 4, 4, 5, 4])
    assert line.level(4, 8) == 4
    assert line.strays(0, 8) == 5
    assert line.settled(0, 8) == 3
    assert scaling.Timeline(pods=[3, 3]).settled(0, 2) == 0
    assert scaling.Timeline(pods=[3, 3, 3, 3, 3, 9]).settled(0, 6) is None
