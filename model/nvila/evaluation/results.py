"""Result files in the shape of lmms-eval: one JSON with all scores, and for every task one JSON line a sample.

Tools that read lmms-eval's files read these: scores stand under `results.<task>."<metric>,<filter>"`, standard errors
under `<metric>_stderr,<filter>`. What it has no place for stands beside: `intervals`, `categories`, `failures`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nvila.evaluation.runner import Outcome, Scored
from nvila.evaluation.scorers.contract import READ, Marks, Metric
from nvila.evaluation.statistics import LEVEL, RESAMPLES, Estimate, estimate_any, estimate_mean
from nvila.evaluation.task import Task

# Failures that a result file lists; it counts all of them.
_MOST_LISTED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """The scores of a task.

    Args:
        task: The task.
        source: Where its data was.
        outcome: Its samples.
        estimates: Every metric that some sample counts for.
        categories: For every category its number of samples and its metrics.
    """

    task: Task
    source: str
    outcome: Outcome
    estimates: Mapping[str, Estimate]
    categories: Mapping[str, tuple[int, Mapping[str, float]]]


def summarize(task: Task, source: str, outcome: Outcome, *, seed: int) -> TaskResult:
    """Compute the scores of a task, with errors and intervals.

    Args:
        task: The task.
        source: Where its data was.
        outcome: Its samples, at least one of them with a score.
        seed: Of resampling.
    """
    marks = [sample.marks for sample in outcome.scored]
    estimates = {}
    for name, metric in task.scorer.metrics.items():
        estimate = _estimate(name, metric, marks, seed)
        if estimate is not None:
            estimates[name] = estimate
    groups: dict[str, list[Marks]] = {}
    for sample in outcome.scored:
        if sample.question.group is not None:
            groups.setdefault(sample.question.group, []).append(sample.marks)
    categories = {group: (len(members), _values(task, members)) for group, members in sorted(groups.items())}
    return TaskResult(task=task, source=source, outcome=outcome, estimates=estimates, categories=categories)


def results_file(results: Sequence[TaskResult], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result file.

    Args:
        results: The tasks.
        about: Fields of the run: `model_name`, `config`, `date`, versions, times.
    """
    by_name = {result.task.name: result for result in results}
    return {
        "results": {name: _scores(result) for name, result in by_name.items()},
        "group_subtasks": {name: [] for name in by_name},
        "configs": {name: _config(result) for name, result in by_name.items()},
        "versions": {name: result.task.version for name, result in by_name.items()},
        "n-shot": dict.fromkeys(by_name, 0),
        "higher_is_better": {
            name: {metric: result.task.scorer.metrics[metric].higher_is_better for metric in result.estimates}
            for name, result in by_name.items()
        },
        "n-samples": {
            name: {"original": result.outcome.total, "effective": len(result.outcome.scored)}
            for name, result in by_name.items()
        },
        "task_hashes": {name: _hash(*(s.question.digest for s in r.outcome.scored)) for name, r in by_name.items()},
        "intervals": {
            name: {
                metric: {"low": _json(e.low), "high": _json(e.high), "level": LEVEL, "method": e.method}
                for metric, e in result.estimates.items()
            }
            for name, result in by_name.items()
        },
        "categories": {
            name: {group: {"samples": n, **values} for group, (n, values) in result.categories.items()}
            for name, result in by_name.items()
            if result.categories
        },
        "failures": {
            name: {
                "count": len(result.outcome.failures),
                "first": [asdict(failure) for failure in result.outcome.failures[:_MOST_LISTED]],
            }
            for name, result in by_name.items()
        },
        **about,
    }


def sample_lines(result: TaskResult) -> Iterator[str]:
    """Yield one JSON line for every sample with a score, in the order of the data."""
    for sample in result.outcome.scored:
        yield json.dumps(_sample(result.task, sample), ensure_ascii=False, default=str) + "\n"


def _estimate(name: str, metric: Metric, marks: Sequence[Marks], seed: int) -> Estimate | None:
    if metric.is_mean:
        values = [float(mark[name]) for mark in marks if mark.get(name) is not None]
        return estimate_mean(values, seed=seed) if values else None
    estimate = estimate_any(marks, metric.aggregate, seed=seed)
    return None if math.isnan(estimate.value) else estimate


def _values(task: Task, marks: Sequence[Marks]) -> dict[str, float]:
    values = {name: metric.aggregate(marks) for name, metric in task.scorer.metrics.items()}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _scores(result: TaskResult) -> dict[str, Any]:
    scores: dict[str, Any] = {"alias": result.task.name}
    suffix = result.task.scorer.filter
    for metric, estimate in result.estimates.items():
        scores[f"{metric},{suffix}"] = estimate.value
        scores[f"{metric}_stderr,{suffix}"] = _json(estimate.stderr)
    return scores


def _config(result: TaskResult) -> dict[str, Any]:
    file = result.task.file
    return {
        "task": result.task.name,
        "dataset_path": result.source,
        "dataset_name": file.data.config,
        "test_split": file.data.split,
        "doc_to_text": file.prompt,
        "output_type": "generate_until",
        "generation_kwargs": {
            "max_new_tokens": file.generation.max_new_tokens,
            "until": file.generation.stop,
            "num_frames": file.generation.num_frames,
            "do_sample": False,
        },
        "metric_list": [{"metric": name} for name in result.task.scorer.metrics],
        "scorer": file.scorer,
        "repeats": 1,
        "num_fewshot": 0,
        "bootstrap_iters": RESAMPLES,
        "metadata": {"version": file.version, "digest": result.task.digest, "where": result.task.where},
    }


def _sample(task: Task, sample: Scored) -> dict[str, Any]:
    question, target = sample.question, sample.question.reference["answer"]
    said = {name: sample.marks[name] for name in task.scorer.metrics if name in sample.marks}
    return {
        "doc_id": question.index,
        "doc": {"id": question.id, **question.reference},
        "target": target,
        "input": question.prompt,
        "resps": [[sample.answer]],
        "filtered_resps": [sample.marks.get(READ, sample.answer)],
        "doc_hash": question.digest,
        "prompt_hash": _hash(question.prompt),
        "target_hash": _hash(json.dumps(target, sort_keys=True, default=str)),
        "category": question.group,
        "marks": sample.marks,
        **said,
    }


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _json(value: float) -> float | None:
    return None if math.isnan(value) else value
