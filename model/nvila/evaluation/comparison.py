"""Two models on the same samples: what the second scores above the first, and on which samples they differ.

The same samples make a difference far surer than two scores with separate errors: what is hard for both cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nvila.errors import ConfigError, DataError
from nvila.evaluation.sample_logs import Logged, LoggedSample, TaskLog
from nvila.evaluation.scorers.contract import Metric, Scorer
from nvila.evaluation.scorers.table import find_scorer
from nvila.evaluation.statistics import Paired, compare_aggregates, compare_paired

Pair = tuple[LoggedSample, LoggedSample]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A metric of two models over the samples that both have.

    Args:
        samples: How many these are.
        reference: Value of the first model.
        candidate: Value of the second.
        paired: Candidate minus reference, with interval and test.
        higher_is_better: Which way is good; None when neither is.
    """

    samples: int
    reference: float
    candidate: float
    paired: Paired
    higher_is_better: bool | None = True

    @property
    def drop(self) -> float:
        """What the candidate loses; negative when it is better."""
        return self.paired.difference if self.higher_is_better is False else -self.paired.difference

    @property
    def verdict(self) -> str:
        """`better` or `worse` when the interval leaves out zero, else `no difference shown`."""
        if self.higher_is_better is None or not (self.paired.low > 0 or self.paired.high < 0):
            return "no difference shown"
        return "worse" if self.drop > 0 else "better"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskComparison:
    """A task under two models.

    Args:
        task: Its name.
        main: The metric that tables show.
        metrics: All metrics that both have.
        categories: The main metric by category.
        worse: Samples that the candidate scores lower in the main metric, by how much, most first.
        better: Samples that it scores higher.
        only_reference: Samples that have a score of the reference alone.
        only_candidate: Samples that have a score of the candidate alone.
        reference: The task's log under the reference.
    """

    task: str
    main: str
    metrics: Mapping[str, Difference]
    categories: Mapping[str, Difference]
    worse: tuple[Pair, ...]
    better: tuple[Pair, ...]
    only_reference: int
    only_candidate: int
    reference: TaskLog

    @property
    def difference(self) -> Difference:
        """The main metric's."""
        return self.metrics[self.main]


def compare(reference: Logged, candidate: Logged, *, seed: int) -> dict[str, TaskComparison]:
    """Compare two evaluations on the tasks that both have.

    Args:
        reference: The first model.
        candidate: The second.
        seed: Of resampling and of random permutations.

    Raises:
        ConfigError: They share no task, or a task is of two versions.
        DataError: They share no sample of a task.
    """
    names = [name for name in reference.tasks if name in candidate.tasks]
    if not names:
        raise ConfigError(
            f"the evaluations share no task: {', '.join(reference.tasks)}; {', '.join(candidate.tasks)}",
            "evaluate both on the same --tasks",
        )
    return {name: compare_task(reference.tasks[name], candidate.tasks[name], seed=seed) for name in names}


def compare_task(reference: TaskLog, candidate: TaskLog, *, seed: int) -> TaskComparison:
    """Compare two models on a task; raises as `compare` does."""
    if reference.digest != candidate.digest:
        raise ConfigError(
            f"{reference.name} was run as version {reference.version} and as version {candidate.version}"
            if reference.version != candidate.version
            else f"{reference.name} was run from two different task files, or with different frames",
            "evaluate both with the same task file and --frames",
        )
    shared = [key for key in reference.samples if key in candidate.samples]
    if not shared:
        raise DataError(f"no sample of {reference.name} has a score of both models", "evaluate both on the same data")
    pairs = [(reference.samples[key], candidate.samples[key]) for key in shared]
    scorer = find_scorer(reference.scorer, reference.name)
    metrics = {
        name: found for name, metric in scorer.metrics.items() if (found := _difference(name, metric, pairs, seed))
    }
    if scorer.main not in metrics:
        raise DataError(f"no shared sample of {reference.name} counts for {scorer.main}", "evaluate more samples")
    moved = [(change, pair) for pair in pairs if (change := _change(scorer, pair))]
    moved.sort(key=lambda item: -abs(item[0]))
    return TaskComparison(
        task=reference.name,
        main=scorer.main,
        metrics=metrics,
        categories=_categories(scorer, pairs, seed),
        worse=tuple(pair for change, pair in moved if change < 0),
        better=tuple(pair for change, pair in moved if change > 0),
        only_reference=len(reference.samples) - len(shared),
        only_candidate=len(candidate.samples) - len(shared),
        reference=reference,
    )


def _difference(name: str, metric: Metric, pairs: Sequence[Pair], seed: int) -> Difference | None:
    if metric.is_mean:
        counted = [(a.marks[name], b.marks[name]) for a, b in pairs if _counts(a, name) and _counts(b, name)]
        if not counted:
            return None
        before, after = [float(a) for a, _ in counted], [float(b) for _, b in counted]
        values = math.fsum(before) / len(before), math.fsum(after) / len(after)
        paired, samples = compare_paired(before, after, seed=seed), len(counted)
    else:
        marks = [(a.marks, b.marks) for a, b in pairs]
        values = metric.aggregate([a for a, _ in marks]), metric.aggregate([b for _, b in marks])
        if any(math.isnan(value) for value in values):
            return None
        paired, samples = compare_aggregates(marks, metric.aggregate, seed=seed), len(marks)
    return Difference(
        samples=samples,
        reference=values[0],
        candidate=values[1],
        paired=paired,
        higher_is_better=metric.higher_is_better,
    )


def _counts(sample: LoggedSample, name: str) -> bool:
    return sample.marks.get(name) is not None


def _categories(scorer: Scorer, pairs: Sequence[Pair], seed: int) -> dict[str, Difference]:
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair[0].category is not None:
            groups.setdefault(pair[0].category, []).append(pair)
    found = {}
    for group, members in sorted(groups.items()):
        if difference := _difference(scorer.main, scorer.metrics[scorer.main], members, seed):
            found[group] = difference
    return found


def _change(scorer: Scorer, pair: Pair) -> float:
    """Return by how much the candidate scores a sample better; 0 where the main metric has no mark of a sample."""
    metric, (before, after) = scorer.metrics[scorer.main], pair
    if not (_counts(before, scorer.main) and _counts(after, scorer.main)):
        return 0.0
    change = float(after.marks[scorer.main]) - float(before.marks[scorer.main])
    return -change if metric.higher_is_better is False else change
