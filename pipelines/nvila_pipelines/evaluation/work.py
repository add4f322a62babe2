"""The work of one process of an evaluation, and that process itself when a launcher starts it."""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila_pipelines.evaluation.request import ANSWERS, FIXTURES, EvaluationRequest

if TYPE_CHECKING:
    from nvila.data.readers.locations import FileSystems
    from nvila.evaluation.answer_log import AnswerLog
    from nvila.evaluation.asking import Question
    from nvila.evaluation.rows import TaskRows
    from nvila.evaluation.runner import Answerer, Failure
    from nvila.evaluation.task import Task
    from nvila.modeling import NVILAForConditionalGeneration
    from nvila.processing import NVILAProcessor
    from nvila.progress import Reporter
    from nvila_platform.endpoint import EndpointAnswerer
    from nvila_platform.settings import Settings


def open_task(request: EvaluationRequest, task: Task, filesystems: FileSystems | None = None) -> TaskRows:
    """Open the data of a task: where the user says it is, its fixture, or what is built in.

    Raises:
        ConfigError: There is none.
        DataError: It is missing, or lacks a column.
    """
    from nvila.evaluation.fixtures import write_fixture
    from nvila.evaluation.rows import open_rows

    place = request.data.get(task.name)
    if place is None and request.fixture and task.file.data.builtin is None:
        place = str(write_fixture(task, request.folder / FIXTURES / f"{task.name}-{task.digest[:12]}"))
    return open_rows(task, place, filesystems=filesystems)


def chosen_tasks(request: EvaluationRequest) -> list[Task]:
    """Return the tasks of a request, as it asks them.

    Raises:
        ConfigError: One of them is unknown.
    """
    from nvila.evaluation.registry import select_tasks

    return [task.with_frames(request.frames) for task in select_tasks(request.tasks)]


def open_log(request: EvaluationRequest, task: Task) -> AnswerLog:
    """Open the answers of the request's model to a task."""
    from nvila.evaluation.answer_log import AnswerLog

    how = {"endpoint": True} if request.url else {"dtype": request.dtype}
    return AnswerLog.open(request.folder / ANSWERS, task, request.model_digest, how)


def answer_tasks(
    request: EvaluationRequest,
    work: list[tuple[Task, TaskRows]],
    settings: Settings,
    reporter: Reporter,
    *,
    rank: int = 0,
    world: int = 1,
) -> tuple[dict[str, list[Question | Failure]], dict[str, Any]]:
    """Answer a process's share of all tasks; the model is loaded when there is something to answer.

    Returns:
        The samples of every task, without media; and what was sent to an endpoint, which is nothing for a model here.

    Raises:
        InfrastructureError: The endpoint is gone; the same command goes on.
    """
    from nvila.evaluation.runner import TaskRun

    @cache
    def load() -> Answerer:
        return load_answerer(request, settings)

    samples: dict[str, list[Question | Failure]] = {}
    for task, rows in work:
        samples[task.name] = TaskRun(
            task=task,
            rows=rows,
            log=open_log(request, task),
            load=load,
            batch_size=request.batch_size,
            limit=request.limit,
            rank=rank,
            world=world,
            reporter=reporter,
        ).run()
    return samples, _traffic(load() if request.url else None, reporter)


def _traffic(answerer: Answerer | None, reporter: Reporter) -> dict[str, Any]:
    """Return and report what was sent to an endpoint."""
    from nvila_platform.endpoint import EndpointAnswerer

    if not isinstance(answerer, EndpointAnswerer):
        return {}
    traffic = answerer.traffic
    if traffic.retries:
        reporter.notice(f"{traffic.retries} of {traffic.requests} requests were sent again")
    for kind, count in sorted(traffic.errors.items()):
        reporter.notice(f"{count} questions have no answer: {kind}")
    return {"requests": traffic.requests, "retries": traffic.retries, "errors": dict(traffic.errors)}


def load_answerer(request: EvaluationRequest, settings: Settings) -> Answerer:
    """Load whoever answers.

    Raises:
        CheckpointError: The model cannot be loaded.
    """
    return _endpoint(request, settings) if request.url else _load_model(request)


def _endpoint(request: EvaluationRequest, settings: Settings) -> EndpointAnswerer:
    from nvila_platform.endpoint import Endpoint, EndpointAnswerer

    known = Endpoint(url=request.url, model=request.model, digest=request.served_digest)
    return EndpointAnswerer(
        known,
        api_key=settings.endpoint_api_key,
        concurrency=request.concurrency,
        retries=request.retries,
        timeout_s=request.timeout_s,
    )


def _load_model(request: EvaluationRequest) -> Answerer:
    import torch

    from nvila.evaluation.model_answerer import ModelAnswerer

    torch.manual_seed(request.seed)
    torch.set_num_threads(request.threads)
    model, processor = load_quietly(Path(request.model), request.dtype)
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if request.device == "cuda" else request.device
    return ModelAnswerer(model.to(device), processor)  # type: ignore[arg-type]  # transformers types `to` as a function


def load_quietly(folder: Path, dtype: str) -> tuple[NVILAForConditionalGeneration, NVILAProcessor]:
    """Load a model folder; `dtype` is that of wide weights, quantized ones are as stored.

    Raises:
        CheckpointError: The folder is no model.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from nvila.assembly import load_model
    from nvila.quantization.saved import is_quantized

    for name in ("torchao", "torchao.kernel.intmm", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()
    wide: dict[str, Any] = {"dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]}
    return load_model(folder, **({} if is_quantized(folder) else wide))


def main(path: str) -> None:
    """Answer a share of what a file asks for."""
    from nvila_platform.s3_filesystem import data_filesystems
    from nvila_platform.settings import Settings
    from nvila_platform.telemetry import EventLog

    request, order = EvaluationRequest.load(Path(path))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    settings = Settings.load()
    filesystems = data_filesystems(settings)
    work = [(task, open_task(request, task, filesystems)) for task in chosen_tasks(request)]
    with EventLog(Path(order["events"]), step=f"evaluate {rank}") as reporter:
        answer_tasks(request, work, settings, reporter, rank=rank, world=world)


if __name__ == "__main__":
    main(sys.argv[1])
