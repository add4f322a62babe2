"""`nvila evaluate`: a model on tasks, or the step of a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from nvila.errors import ConfigError
from nvila_pipelines.cli.evaluation_options import add_evaluation_arguments, check_side, given_options, request_of
from nvila_pipelines.cli.options import add_recipe_arguments, prepare_workspace
from nvila_pipelines.cli.output import emit, emit_json
from nvila_pipelines.cli.step import run_to
from nvila_platform.settings import Settings

SUMMARY = "measure a model on benchmark tasks, or on the split of a recipe"
EPILOG = """\
examples:
  nvila evaluate models:/nvila@champion --tasks builtin       tasks that need no data of yours
  nvila evaluate MODEL --tasks chartqa,pope --data chartqa=/data/chartqa --data pope=hub
  nvila evaluate MODEL --tasks all --fixture                  a few made samples of every task: does it run?
  nvila evaluate MODEL --tasks my-task.yaml --data my-task=rows.jsonl
  nvila evaluate http://127.0.0.1:8080 --tasks digit_pages    a deployed service, as its clients see it
  nvila evaluate --list-tasks                                 every task, its version and what it is
  nvila evaluate fast seed=1                                  the evaluation step of a recipe

outputs in DIR:
  MODEL/DATE_results.json         scores with errors and intervals, versions and hashes, as lmms-eval writes them
  MODEL/DATE_samples_TASK.jsonl   every sample with its prompt, answer and marks
  answers/                        what has been answered; the same command goes on after an interruption
"""


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
    words.metavar, words.help = (
        "MODEL",
        "model folder, models:/NAME@ALIAS or address of an OpenAI endpoint; or a recipe and fields of it",
    )
    parser.add_argument(
        "--model",
        choices=("wide", "quantized"),
        help="of a recipe: which form of the model (default: quantized)",
    )
    add_evaluation_arguments(parser)
    parser.add_argument(
        "--strict", action="store_true", help="end with code 1 also when a task is skipped: no prompt of it fits"
    )
    parser.add_argument("--list-tasks", action="store_true", help="list the tasks and end")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do the work and return the exit code."""
    if args.list_tasks:
        return _list_tasks(as_json=args.json)
    if not given_options(args) and not _is_model(args.words):
        return run_to(f"evaluate-{args.model or 'quantized'}", args, settings)
    if args.model is not None or args.fast:
        wrong = "--fast" if args.fast else "--model"
        raise ConfigError(f"{wrong} is about a recipe, but tasks are meant", "leave it out")
    if len(args.words) != 1:
        raise ConfigError(
            "no model is named" if not args.words else f"two models are named: {args.words[0]} and {args.words[1]}",
            "nvila evaluate MODEL --tasks NAMES",
        )
    check_side(args.words[0], args)
    prepare_workspace(settings)
    request = request_of(args.words[0], args, settings)
    from nvila_pipelines.evaluation.run import evaluate
    from nvila_pipelines.evaluation.table import result_lines, skipped_lines
    from nvila_platform.telemetry import ProgressView

    with ProgressView(format=settings.log_format) as view:
        done = evaluate(request, settings, view)
    code = 1 if done.unscored or (args.strict and done.skipped) else 0
    if args.json:
        emit_json(done.to_dict())
        return code
    for line in [*result_lines(done.results), *skipped_lines(done.skipped)]:
        emit(line)
    emit(f"results: {done.file}")
    return code


def _is_model(words: list[str]) -> bool:
    """Whether the words name a model rather than a recipe."""
    if len(words) != 1:
        return False
    folders = (Path(words[0]), Path(words[0]) / "model")
    return words[0].startswith(("models:/", "http://", "https://")) or any(
        (folder / "config.json").is_file() for folder in folders
    )


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
