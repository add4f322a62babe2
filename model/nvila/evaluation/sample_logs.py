"""Reading what an evaluation wrote: the result file, and the sample log of every task in it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvila.errors import DataError
from nvila.evaluation.scorers.contract import Marks

RESULTS_SUFFIX = "_results.json"
_ANEW = "run nvila evaluate again"

# What two logs share of a sample: its digest, and which of several equal samples it is.
SampleKey = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedSample:
    """One line of a sample log.

    Args:
        index: Number of the sample in the data.
        id: What the data calls it.
        prompt: What was asked, with markers for media.
        target: The reference answer.
        answer: What the model said.
        category: What results are told apart by.
        marks: What the scorer gave.
        digest: Identity of the sample: texts, media and reference.
    """

    index: int
    id: str
    prompt: str
    target: Any
    answer: str
    category: str | None
    marks: Marks
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLog:
    """A task of an evaluation.

    Args:
        name: The task.
        version: Its version.
        digest: Identity of its file.
        scorer: Name of its scorer.
        where: The task's file.
        source: Where its data was.
        total: Samples, with those that have no score.
        samples: Those with a score.
    """

    name: str
    version: int
    digest: str
    scorer: str
    where: str
    source: str
    total: int
    samples: Mapping[SampleKey, LoggedSample]


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """A finished evaluation.

    Args:
        file: The result file.
        results: What it says.
        tasks: Its tasks by name.
    """

    file: Path
    results: Mapping[str, Any]
    tasks: Mapping[str, TaskLog]


def find_results(path: Path) -> Path | None:
    """Return a result file: the path itself, or the newest one in a folder; None where there is none."""
    if path.is_file() and path.name.endswith(RESULTS_SUFFIX):
        return path
    found = sorted(path.glob(f"*{RESULTS_SUFFIX}")) if path.is_dir() else []
    return found[-1] if found else None


def read_logged(file: Path) -> Logged:
    """Read a result file and its sample logs.

    Args:
        file: `DATE_results.json`; the logs stand beside it.

    Raises:
        DataError: A file is missing, cut short, or of another program.
    """
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        names = list(results["results"])
        logs = {name: _task_log(file, results, name) for name in names}
    except (OSError, ValueError) as e:
        raise DataError(f"{file} cannot be read: {e}", _ANEW) from e
    except (KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{file} is no result file of nvila evaluate: {e!r}", _ANEW) from e
    return Logged(file=file, results=results, tasks=logs)


def _task_log(file: Path, results: Mapping[str, Any], name: str) -> TaskLog:
    config, counts = results["configs"][name], results["n-samples"][name]
    path = file.with_name(f"{file.name.removesuffix(RESULTS_SUFFIX)}_samples_{name}.jsonl")
    if not path.is_file():
        raise DataError(f"the sample log {path} is missing", "keep it beside the result file")
    samples: dict[SampleKey, LoggedSample] = {}
    seen: Counter[str] = Counter()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            sample = _sample(json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError) as e:
            raise DataError(f"{path}:{number} is no sample of nvila evaluate: {e!r}", _ANEW) from e
        samples[sample.digest, seen[sample.digest]] = sample
        seen[sample.digest] += 1
    if len(samples) != counts["effective"]:
        raise DataError(f"{path} has {len(samples)} samples, {file.name} counts {counts['effective']}", _ANEW)
    return TaskLog(
        name=name,
        version=int(results["versions"][name]),
        digest=config["metadata"]["digest"],
        scorer=config["scorer"],
        where=config["metadata"].get("where", ""),
        source=config["dataset_path"],
        total=int(counts["original"]),
        samples=samples,
    )


def _sample(line: Mapping[str, Any]) -> LoggedSample:
    return LoggedSample(
        index=int(line["doc_id"]),
        id=str(line["doc"]["id"]),
        prompt=line["input"],
        target=line["target"],
        answer=line["resps"][0][0],
        category=line["category"],
        marks=line["marks"],
        digest=line["doc_hash"],
    )
