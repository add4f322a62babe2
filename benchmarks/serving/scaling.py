"""Autoscaling simulated: pods with the speed of a recorded server, scaled by the formulas of Kubernetes and KEDA.

The rules are those of the HorizontalPodAutoscaler, which KEDA feeds: desired = ceil(metric / target) for a metric that
is a sum over pods (AverageValue), nothing within a tolerance of 10%, up by at most the double or 4 pods in 15 s, down
only to the highest wish of the last 300 s, and by at most a share of the pods a minute if the policy says so (rounded
up). KEDA asks Prometheus whenever the autoscaler asks it, every 15 s; its `pollingInterval` matters from zero to one
pod and with `useCachedMetrics`. What Prometheus says is up to a scrape old; here it always is.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median

TOLERANCE = 0.1
UP_PODS, UP_FACTOR, UP_PERIOD_S = 4, 2, 15
DOWN_WINDOW_S, DOWN_PERIOD_S = 300, 60
SYNC_S, SCRAPE_S = 15, 15


@dataclass(frozen=True, slots=True, kw_only=True)
class PodSpeed:
    """Requests a second that one pod answers, by how many it has at once.

    Args:
        in_flight: Requests at once, rising.
        rates: Answered a second at each.
    """

    in_flight: tuple[float, ...]
    rates: tuple[float, ...]

    def rate(self, load: float) -> float:
        """Interpolate; below the first point in proportion, above the last one no faster."""
        if load <= 0:
            return 0.0
        if load <= self.in_flight[0]:
            return self.rates[0] * load / self.in_flight[0]
        for k in range(1, len(self.in_flight)):
            low, high = self.in_flight[k - 1], self.in_flight[k]
            if load <= high:
                share = (load - low) / (high - low)
                return self.rates[k - 1] + share * (self.rates[k] - self.rates[k - 1])
        return self.rates[-1]

    def load(self, rate: float) -> float:
        """Return the smallest number at once at which so many a second are answered."""
        low, high = 0.0, self.in_flight[-1]
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.rate(middle) < rate else (low, middle)
        return high

    @property
    def best(self) -> float:
        """The highest rate."""
        return max(self.rates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How many pods there may be, and when another is wanted.

    Args:
        target: Requests running and waiting a pod.
        lowest: Fewest pods.
        highest: Most pods.
        start_s: From a pod's creation until it answers.
        down_window_s: Seconds over which the highest wish counts when pods are taken away.
        down_share: Largest share of the pods that is taken away in a minute.
        mean_s: Seconds whose mean is the metric, as `avg_over_time` of Prometheus has it; 0 takes the latest scrape.
    """

    target: float
    lowest: int = 1
    highest: int = 20
    start_s: float = 30.0
    down_window_s: float = DOWN_WINDOW_S
    down_share: float = 1.0
    mean_s: int = 0


@dataclass(slots=True)
class Timeline:
    """What happened, second by second."""

    pods: list[int] = field(default_factory=list)
    ready: list[int] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)

    def level(self, start: int, stop: int) -> float:
        """Return the median number of pods in [start, stop)."""
        return float(median(self.pods[start:stop]))

    def strays(self, start: int, stop: int) -> float:
        """Return how many pods there were at most beside the median in [start, stop)."""
        level = self.level(start, stop)
        return max(abs(pods - level) for pods in self.pods[start:stop])

    def settled(self, start: int, stop: int) -> int | None:
        """Return the seconds from `start` until the number of pods stays within one of its later median."""
        level = self.level((start + stop) // 2, stop)
        away = [second for second in range(start, stop) if abs(self.pods[second] - level) > 1]
        if not away:
            return 0
        return away[-1] + 1 - start if away[-1] + 1 < stop else None


def simulate(arrivals: Callable[[int], float], seconds: int, speed: PodSpeed, policy: Policy, seed: int) -> Timeline:
    """Run the cluster second by second; requests are taken to last less than one.

    Args:
        arrivals: Mean requests of a second.
        seconds: How long.
        speed: Of one pod.
        policy: Of the autoscaler.
        seed: Of the arrivals, which are Poisson.
    """
    draw = random.Random(seed)
    starting: list[float] = []
    ready, backlog = policy.lowest, 0.0
    scraped: deque[float] = deque([0.0], maxlen=SCRAPE_S + policy.mean_s + 1)
    wishes: deque[tuple[int, int]] = deque()
    line = Timeline()
    for now in range(seconds):
        ready += sum(at <= now for at in starting)
        starting = [at for at in starting if at > now]
        arrived = backlog + poisson(arrivals(now), draw)
        done = min(arrived, ready * speed.best)
        backlog = arrived - done
        # Between two seconds many requests come and go: what is in hand follows from the rate.
        load = backlog + (ready * speed.load(done / ready) if ready else 0.0)
        scraped.append(load)
        if now % SYNC_S == 0:
            # The samples that Prometheus has: the newest is a scrape old, the others a scrape apart.
            heard = mean(list(scraped)[max(len(scraped) - 1 - SCRAPE_S, 0) :: -SCRAPE_S])
            pods = ready + len(starting)
            a_minute_ago = line.pods[-DOWN_PERIOD_S] if len(line.pods) >= DOWN_PERIOD_S else pods
            wanted = decide(pods, heard, policy, wishes, now, a_minute_ago)
            if wanted > pods:
                starting += [now + policy.start_s] * (wanted - pods)
            elif wanted < pods:
                spare = pods - wanted
                cut = min(spare, len(starting))
                starting = starting[: len(starting) - cut]
                ready -= spare - cut
        line.pods.append(ready + len(starting))
        line.ready.append(ready)
        line.load.append(load)
        line.wait_s.append(load / max(done, 1e-9) if load > 1e-9 else 0.0)
    return line


def decide(
    pods: int,
    metric: float,
    policy: Policy,
    wishes: deque[tuple[int, int]],
    now: int,
    a_minute_ago: int | None = None,
) -> int:
    """Return how many pods the autoscaler wants.

    Args:
        pods: There are now, those that start included.
        metric: Sum over the pods.
        policy: Its settings.
        wishes: Earlier (second, wish) pairs; this one is added.
        now: The second.
        a_minute_ago: Pods there were; None takes those of now.
    """
    ratio = metric / (policy.target * pods)
    wish = pods if abs(ratio - 1) <= TOLERANCE else math.ceil(metric / policy.target)
    wish = min(max(wish, policy.lowest), policy.highest)
    wishes.append((now, wish))
    while wishes[0][0] < now - policy.down_window_s:
        wishes.popleft()
    if wish >= pods:
        return min(wish, max(pods * UP_FACTOR, pods + UP_PODS))
    before = max(pods, a_minute_ago or 0)
    slowest = before - math.ceil(policy.down_share * before)
    return min(pods, max(slowest, *(earlier for _, earlier in wishes)))


def poisson(mean: float, draw: random.Random) -> int:
    """Draw from a Poisson distribution: by multiplication, in parts that do not underflow."""
    total = 0
    while mean > 500:
        total += poisson(500, draw)
        mean -= 500
    limit, product = math.exp(-mean), draw.random()
    while product > limit:
        total += 1
        product *= draw.random()
    return total


def stepped(steps: Sequence[tuple[int, float]]) -> Callable[[int], float]:
    """Return a load that changes at given seconds: (from, rate) pairs, rising."""

    def rate(now: int) -> float:
        return [value for start, value in steps if start <= now][-1]

    return rate
