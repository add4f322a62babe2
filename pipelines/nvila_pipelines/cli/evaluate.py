"""`nvila evaluate`: a model on tasks, or the step of a recipe."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.errors import ConfigError
from nvila_pipelines.cli.options import add_recipe_arguments, prepare_workspace, share, whole_number
from nvila_pipelines.cli.output import emit, emit_json
from nvila_pipelines.cli.step import run_to
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila_pipelines.evaluation.request import EvaluationRequest

SUMMARY = "measure a model on benchmark tasks, or on the split of a recipe"
EPILOG = """\
examples:
  nvila evaluate models:/nvila@champion --tasks builtin       tasks that need no data of yours
  nvila evaluate MODEL --tasks chartqa,pope --data chartqa=/data/chartqa --data pope=hub
  nvila evaluate MODEL --tasks all --fixture                  a few made samples of every task: does it run?
  nvila evaluate MODEL --tasks my-task.yaml --data my-task=rows.jsonl
  nvila evaluate --list-tasks                                 every task, its version and what it is
  nvila evaluate fast seed=1                                  the evaluation step of a recipe

outputs in DIR:
  MODEL/DATE_results.json         scores with errors and intervals, versions and hashes, as lmms-eval writes them
  MODEL/DATE_samples_TASK.jsonl   every sample with its prompt, answer and marks
  answers/                        what has been answered; the same command goes on after an interruption
"""
_TASK_OPTIONS = ("tasks", "data", "limit", "batch_size", "processes", "threads", "dtype", "device", "max_failed", "out")
_FLAGS = ("fixture", "seed")
BUILTIN = "builtin"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own arguments."""
    add_recipe_arguments(parser)
    parser.usage = (
        "%(prog)s MODEL [--tasks TASKS] [options]\n"
        "       %(prog)s --list-tasks\n"
        "       %(prog)s [RECIPE] [KEY=VALUE ...] [options]        the step of a recipe"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    words = next(action for action in parser._actions if action.dest == "words")
    words.metavar, words.help = "MODEL", "model folder or models:/NAME@ALIAS; or a recipe and fields of it to change"
    parser.add_argument(
        "--model",
        choices=("wide", "quantized"),
        help="of a recipe: which form of the model (default: quantized)",
    )
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks", action="append", metavar="NAMES", help=f"names, tags or YAML files, with commas (default: {BUILTIN})"
    )
    tasks.add_argument(
        "--data",
        action="append",
        metavar="TASK=PLACE",
        help="folder, file or address of a task's data; hub, or hub:ORG/NAME, downloads it",
    )
    tasks.add_argument("--fixture", action="store_true", default=None, help="use a few made samples of each task")
    tasks.add_argument("--limit", type=whole_number, metavar="N", help="only the first N samples of each task")
    tasks.add_argument("--out", type=Path, metavar="DIR", help="folder of results (default: WORKSPACE/evaluations)")
    tasks.add_argument("--list-tasks", action="store_true", help="list the tasks and end")
    running = parser.add_argument_group("running")
    running.add_argument("--batch-size", type=whole_number, metavar="N", help="questions asked together (default: 32)")
    running.add_argument("--processes", type=whole_number, metavar="N", help="local processes (default: 1)")
    running.add_argument(
        "--threads", type=whole_number, metavar="N", help="threads of a process (default: a share of all)"
    )
    running.add_argument("--dtype", choices=("fp32", "bf16"), help="type of the weights (default: fp32)")
    running.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where models run (default: a GPU if any)")
    running.add_argument("--seed", type=int, metavar="N", help="of resampled intervals (default: 0)")
    running.add_argument(
        "--max-failed", type=share, metavar="SHARE", help="stop when more samples have no score (default: 10%%)"
    )


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    if args.list_tasks:
        return _list_tasks(as_json=args.json)
    given = [f"--{name.replace('_', '-')}" for name in (*_TASK_OPTIONS, *_FLAGS) if getattr(args, name) is not None]
    if not given and not _is_model(args.words):
        return run_to(f"evaluate-{args.model or 'quantized'}", args, settings)
    if args.model is not None or args.fast:
        wrong = "--fast" if args.fast else "--model"
        raise ConfigError(f"{wrong} is about a recipe, but tasks are meant", "leave it out")
    if len(args.words) != 1:
        raise ConfigError(
            "no model is named" if not args.words else f"two models are named: {args.words[0]} and {args.words[1]}",
            "nvila evaluate MODEL --tasks NAMES",
        )
    prepare_workspace(settings)
    request = _request(args, settings)
    from nvila_pipelines.evaluation.run import evaluate
    from nvila_pipelines.evaluation.table import result_lines
    from nvila_platform.telemetry import ProgressView

    with ProgressView(format=settings.log_format) as view:
        done = evaluate(request, settings, view)
    if args.json:
        emit_json(done.to_dict())
        return 0
    for line in result_lines(done.results):
        emit(line)
    emit(f"results: {done.file}")
    return 0


def _is_model(words: list[str]) -> bool:
    """Whether the words name a model rather than a recipe."""
    if len(words) != 1:
        return False
    folders = (Path(words[0]), Path(words[0]) / "model")
    return words[0].startswith("models:/") or any((folder / "config.json").is_file() for folder in folders)


def _list_tasks(*, as_json: bool) -> int:
    from nvila.evaluation.registry import find_task, task_files

    tasks = [find_task(name) for name in task_files()]
    if as_json:
        emit_json(
            {task.name: {"version": task.version, "title": task.file.title, "tags": task.file.tags} for task in tasks}
        )
        return 0
    width = max(len(task.name) for task in tasks)
    for task in tasks:
        emit(f"{task.name:<{width}}  v{task.version}  {', '.join(task.file.tags):<14}  {task.file.title}")
    return 0


def _request(args: argparse.Namespace, settings: Settings) -> EvaluationRequest:
    from nvila_pipelines.cli.serve import find_model
    from nvila_pipelines.evaluation.request import EvaluationRequest
    from nvila_pipelines.evaluation.run import model_digest

    source = find_model(args.words[0], settings)
    folder = source.directory
    name = f"{source.name}-v{source.version}" if source.version != "unregistered" else folder.name
    processes = args.processes or 1
    names = ("limit", "batch_size", "dtype", "seed", "max_failed", "fixture")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    return EvaluationRequest(
        model=str(folder),
        model_name=folder.parent.name if name == "model" else name,
        model_digest=model_digest(folder),
        tasks=tuple(_lasting(word) for text in args.tasks or [BUILTIN] for word in text.split(",")),
        out=str((args.out or settings.workspace / "evaluations").absolute()),
        data=_data(args.data or []),
        processes=processes,
        threads=args.threads or max(1, (os.cpu_count() or 1) // processes),
        device=_device(args.device or "auto"),
        **options,
    )


def _data(words: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, separator, place = word.partition("=")
        if not separator or not place:
            raise ConfigError(f"--data {word!r} names no place", "write TASK=FOLDER")
        if name in found:
            raise ConfigError(f"--data names '{name}' twice", "leave one of them out")
        found[name] = _lasting(place)
    return found


def _lasting(place: str) -> str:
    """Return a local path as one that means the same in another process; names and addresses stay."""
    return str(Path(place).absolute()) if Path(place).exists() else place


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
