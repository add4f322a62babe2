"""An evaluation from request to result files."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila_pipelines.evaluation.request import SCRATCH, EvaluationRequest
from nvila_pipelines.evaluation.work import answer_tasks, chosen_tasks, open_log, open_task
from nvila_pipelines.processes import run_watched
from nvila_platform.artifacts import code_version, file_sha256, storage_errors, write_atomically

if TYPE_CHECKING:
    from nvila.evaluation.asking import Question
    from nvila.evaluation.results import TaskResult
    from nvila.evaluation.runner import Failure
    from nvila.evaluation.task import Task
    from nvila_platform.settings import Settings
    from nvila_platform.telemetry import ProgressView

STEP = "evaluate"
_VERSIONS = ("nvila", "torch", "transformers", "torchao", "numpy", "av", "pillow")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation made.

    Args:
        results: Every task with its scores.
        file: The result file.
        samples: The sample log of every task.
        unscored: Tasks without a result, and why: no sample of theirs, or too few, could be answered.
        skipped: Tasks that the model cannot be asked, and why: no prompt of theirs fits into its context.
    """

    results: tuple[TaskResult, ...]
    file: Path
    samples: Mapping[str, Path]
    unscored: Mapping[str, str]
    skipped: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form of the command."""
        return {
            "results": json.loads(self.file.read_text(encoding="utf-8"))["results"],
            "file": str(self.file),
            "samples": {name: str(path) for name, path in self.samples.items()},
            "unscored": dict(self.unscored),
            "skipped": dict(self.skipped),
        }

    def whole(self, *, but_skipped: bool = False) -> Evaluation:
        """Return this, for a caller that cannot do without any of the tasks.

        Args:
            but_skipped: It can do without those that the model cannot be asked.

        Raises:
            DataError: A task has no result.
        """
        from nvila.errors import DataError

        for problem in self.unscored.values():
            raise DataError(problem, "mend the data, leave the task out, or allow more with --max-failed")
        for name, problem in () if but_skipped else self.skipped.items():
            raise DataError(f"{name} cannot be asked: {problem}", "leave the task out")
        return self


def evaluate(request: EvaluationRequest, settings: Settings, view: ProgressView) -> Evaluation:
    """Answer what is not answered yet, score everything, and write the result files.

    A task that cannot be scored costs the others nothing.

    Raises:
        ConfigError: A task is unknown or has no data here.
        DataError: The data cannot be read, or too many samples of every task have no score.
        ResourceError: The disk is full.
    """
    from nvila.errors import DataError
    from nvila.evaluation.results import summarize
    from nvila.evaluation.runner import check_failures, score_all
    from nvila_platform.s3_filesystem import data_filesystems

    started = time.time()
    clock = time.monotonic()
    tasks = chosen_tasks(request)
    _check_data(request, tasks)
    filesystems = data_filesystems(settings)
    with storage_errors(request.folder):
        (request.folder / SCRATCH).mkdir(parents=True, exist_ok=True)
    work = [(task, open_task(request, task, filesystems)) for task in tasks]
    reporter = view.reporter(STEP)
    for task in tasks:
        for other in open_log(request, task).others(task, request.model_digest):
            reporter.notice(f"answers to {task.name} version {other} are not used for version {task.version}")
    traffic: dict[str, Any] = {}
    samples: dict[str, list[Question | Failure]] = {}
    if request.processes > 1:
        _launch(request, settings, view)
    else:
        samples, traffic = answer_tasks(request, work, settings, reporter)
    results = []
    unscored: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for task, rows in work:
        reporter.progress(f"score {task.name}", 0, 0)
        # Several processes have each read a share; then the data are read once more.
        outcome = score_all(task, rows, open_log(request, task), request.limit, samples=samples.get(task.name))
        if outcome.too_long and len(work) > 1:
            skipped[task.name] = outcome.too_long
            continue
        try:
            check_failures(task, outcome, request.max_failed)
        except DataError as e:
            if len(work) == 1:
                raise
            unscored[task.name] = e.message
            reporter.notice(f"{task.name} has no result: {e}")
            continue
        if outcome.failures:
            reporter.notice(f"{task.name}: {len(outcome.failures)} of {outcome.total} samples have no score")
        results.append(summarize(task, rows.name, outcome, seed=request.seed))
    if not results:
        raise DataError(next(iter((unscored | skipped).values())), "no task has a result; see the notices above")
    about = _about(request, started, time.monotonic() - clock)
    if request.url:
        about |= {"endpoint": {"url": request.url, "served_digest": request.served_digest, **traffic}}
    return _write(request, results, about | {"unscored": unscored, "skipped": skipped})


def model_digest(folder: Path) -> str:
    """Return the identity of a model folder that has no manifest: of the names and bytes of its files."""
    import hashlib

    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            digest.update(f"{path.relative_to(folder).as_posix()}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _check_data(request: EvaluationRequest, tasks: Sequence[Task]) -> None:
    from nvila.errors import ConfigError, nearest

    names = [task.name for task in tasks]
    for name in request.data:
        if name not in names:
            raise ConfigError(f"--data names '{name}', which is not among the tasks", nearest(name, names))


def _launch(request: EvaluationRequest, settings: Settings, view: ProgressView) -> None:
    """Answer in several processes and draw what they report."""
    scratch = request.folder / SCRATCH
    events, order = scratch / "events.jsonl", scratch / "order.json"
    request.save(order, events=str(events))
    run_watched(
        "nvila_pipelines.evaluation.work",
        order,
        events=events,
        processes=request.processes,
        threads=request.threads,
        settings=settings,
        view=view,
    )


def _about(request: EvaluationRequest, started: float, seconds: float) -> dict[str, Any]:
    return {
        "config": {
            "model": "openai" if request.url else "nvila",
            "model_args": f"base_url={request.url},model={request.model}"
            if request.url
            else f"pretrained={request.model},dtype={request.dtype}",
            "batch_size": request.batch_size,
            "device": request.device,
            "limit": request.limit,
            "frames": request.frames,
            "random_seed": request.seed,
            "numpy_seed": request.seed,
            "torch_seed": request.seed,
            "processes": request.processes,
            "fixture": request.fixture,
        },
        "git_hash": code_version(),
        "date": started,
        "model_source": "nvila",
        "model_name": request.model_name,
        "model_name_sanitized": _UNSAFE.sub("_", request.model_name),
        "model_digest": request.model_digest,
        "software": _software(),
        "total_evaluation_time_seconds": round(seconds, 3),
    }


def _software() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _write(request: EvaluationRequest, results: Sequence[TaskResult], about: Mapping[str, Any]) -> Evaluation:
    from nvila.evaluation.results import results_file, sample_lines

    folder = request.folder / str(about["model_name_sanitized"])
    moment = datetime.fromtimestamp(about["date"], UTC).strftime("%Y%m%d_%H%M%S_%f")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        samples = {}
        for result in results:
            path = folder / f"{moment}_samples_{result.task.name}.jsonl"
            write_atomically(path, "".join(sample_lines(result)))
            samples[result.task.name] = path
        # Last, so that a result file never stands without its samples.
        file = folder / f"{moment}_results.json"
        write_atomically(file, json.dumps(results_file(results, about), indent=2, ensure_ascii=False) + "\n")
    return Evaluation(tuple(results), file, samples, about["unscored"], about["skipped"])
