"""What the verbs that evaluate models take: tasks and their data, and how models run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.errors import ConfigError
from nvila_pipelines.cli.options import count, share, whole_number
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila_pipelines.evaluation.request import EvaluationRequest

BUILTIN = "builtin"
OPTIONS = ("tasks", "data", "limit", "batch_size", "processes", "threads", "dtype", "device", "max_failed", "out")
FLAGS = ("fixture", "frames", "seed", "served_model", "concurrency", "retries", "timeout")
_HERE, _THERE = ("processes", "threads", "dtype", "device"), ("served_model", "concurrency", "retries", "timeout")
_ADDRESSES = ("http://", "https://")


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare tasks, data, and how models run; nothing has a default, so that what is given shows."""
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
    tasks.add_argument(
        "--frames", type=whole_number, metavar="N", help="frames of a video (default: the task's or the model's)"
    )
    tasks.add_argument("--out", type=Path, metavar="DIR", help="folder of results (default: WORKSPACE/evaluations)")
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
    service = parser.add_argument_group("endpoints, where MODEL is http://HOST or https://HOST")
    service.add_argument("--served-model", metavar="NAME", help="model to ask for (default: the only one)")
    service.add_argument("--concurrency", type=whole_number, metavar="N", help="requests at once (default: 8)")
    service.add_argument(
        "--retries", type=count, metavar="N", help="times a request is sent again after a passing error (default: 3)"
    )
    service.add_argument("--timeout", type=float, metavar="SECONDS", help="longest wait for an answer (default: 60)")


def given_options(args: argparse.Namespace) -> list[str]:
    """Return which of these options are given, as they are written."""
    return [f"--{name.replace('_', '-')}" for name in (*OPTIONS, *FLAGS) if getattr(args, name) is not None]


def check_side(model: str, args: argparse.Namespace) -> None:
    """Refuse options that mean nothing for the one model of a command.

    Raises:
        ConfigError: With the option.
    """
    remote = model.startswith(_ADDRESSES)
    for option in _HERE if remote else _THERE:
        if getattr(args, option) is not None:
            what = "a model here, but an endpoint is named" if remote else "an endpoint, but a model here is named"
            raise ConfigError(f"--{option.replace('_', '-')} is about {what}", "leave it out")


def request_of(model: str, args: argparse.Namespace, settings: Settings) -> EvaluationRequest:
    """Return the evaluation of a model that the arguments ask for.

    Raises:
        ConfigError: The model or an argument is wrong.
    """
    if model.startswith(_ADDRESSES):
        return _endpoint_request(model, args, settings)
    from nvila_pipelines.evaluation.request import EvaluationRequest

    folder, name, digest = model_of(model, settings)
    processes = args.processes or 1
    return EvaluationRequest(
        model=str(folder),
        model_name=name,
        model_digest=digest,
        processes=processes,
        threads=args.threads or max(1, (os.cpu_count() or 1) // processes),
        device=device_of(args.device or "auto"),
        **_common(args, settings),
    )


def model_of(word: str, settings: Settings) -> tuple[Path, str, str]:
    """Return the folder of a model, what it is called, and the identity of its files.

    Raises:
        ConfigError: There is no such model.
    """
    from nvila_pipelines.cli.serve import find_model
    from nvila_pipelines.evaluation.run import model_digest

    source = find_model(word, settings)
    folder = source.directory
    registered = source.version != "unregistered"
    name = f"{source.name}-v{source.version}" if registered else _folder_name(folder)
    return folder, name, model_digest(folder)


def _endpoint_request(url: str, args: argparse.Namespace, settings: Settings) -> EvaluationRequest:
    """Return the evaluation of a service; it is asked what it serves."""
    import hashlib
    from urllib.parse import urlsplit

    from nvila_pipelines.evaluation.request import EvaluationRequest
    from nvila_platform.endpoint import find_endpoint

    found = find_endpoint(url, args.served_model, api_key=settings.endpoint_api_key)
    known = {"concurrency": args.concurrency, "retries": args.retries, "timeout_s": args.timeout}
    return EvaluationRequest(
        model=found.model,
        model_name=f"{urlsplit(url).netloc}-{found.model}",
        # Other servers tell no digest: answers are then kept by address and name.
        model_digest=found.digest or hashlib.sha256(f"{found.url} {found.model}".encode()).hexdigest(),
        url=found.url,
        served_digest=found.digest,
        **{name: value for name, value in known.items() if value is not None},
        **_common(args, settings),
    )


def _common(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    names = ("limit", "frames", "batch_size", "dtype", "seed", "max_failed", "fixture")
    return {name: value for name in names if (value := getattr(args, name)) is not None} | {
        "tasks": tuple(_lasting(word) for text in args.tasks or [BUILTIN] for word in text.split(",")),
        "out": str((args.out or settings.workspace / "evaluations").absolute()),
        "data": places_of_data(args),
    }


def _folder_name(folder: Path) -> str:
    """Return what people would call the model of a folder; in a step's directory that is the step and its key."""
    from nvila_platform.artifacts import read_manifest

    if folder.name != "model":
        return folder.name
    manifest = read_manifest(folder.parent)
    return folder.parent.name if manifest is None else f"{manifest.step}-{manifest.key[:8]}"


def places_of_data(args: argparse.Namespace) -> dict[str, str]:
    """Return the place of data by task.

    Raises:
        ConfigError: One is malformed, or given twice.
    """
    found: dict[str, str] = {}
    for word in args.data or []:
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


def device_of(wanted: str) -> str:
    """Return where to run: `auto` is a GPU if there is one."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
